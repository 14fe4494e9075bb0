"""Records to store: texts beyond ASCII, the largest numbers, verdicts of every kind."""

from dataclasses import replace

from rsrlm.records import Group, Judgement, PreferencePair, Prompt, Response, Sampling, Scored, Unparsed, group_id

LAST_SEED = 2**63 - 1
SAMPLING = Sampling(temperature=0.7, top_p=0.95, max_tokens=8, seed=LAST_SEED)


def response(index: int, text: str = "Grüße,\u2028\r\nTee") -> Response:
    return Response(
        id=f"00/tea/{index}",
        prompt_id="tea",
        index=index,
        role="actor",
        text=text,
        token_ids=(128255, 0),
        prompt_token_ids=(1,),
        finish_reason="length",
        weight_version="M0",
        sampling=replace(SAMPLING, seed=LAST_SEED - index),
    )


def judgement(index: int, verdict: Scored | Unparsed, sampling: Sampling | None = SAMPLING) -> Judgement:
    return Judgement(
        id=f"00/tea/0#{index}",
        prompt_id="tea",
        response_id="00/tea/0",
        index=index,
        role="judge",
        judge="additive (text)",
        text="",
        token_ids=(),
        finish_reason="stop",
        weight_version="M0" if sampling else "",
        sampling=sampling,
        verdict=verdict,
    )


JUDGEMENTS = [
    judgement(0, Scored(points=1 / 3)),
    judgement(1, Scored(points=2.0, variance=0.0)),
    judgement(2, Unparsed(reason="no score line")),
    judgement(3, Scored(points=-7.0), sampling=None),
]
PAIR = PreferencePair(
    id="00/tea/1>0",
    prompt_id="tea",
    kind="actor",
    chosen_id="00/tea/1",
    rejected_id="00/tea/0",
    prompt_token_ids=(1,),
    chosen_token_ids=(2, 128255),
    rejected_token_ids=(),
    chosen_score=1 / 3,
    rejected_score=0.0,
    weight_version="M0",
)


def made_for(prompt: str, responses: int = 2) -> Group:
    """A group in iteration 0 whose responses have two judgements each."""
    group = group_id(0, prompt)
    made = [replace(response(index), id=f"{group}/{index}", prompt_id=prompt) for index in range(responses)]
    judgements = [
        replace(judgement(number, verdict), id=f"{one.id}#{number}", prompt_id=prompt, response_id=one.id)
        for one in made
        for number, verdict in enumerate((Scored(points=one.index / 3), Unparsed(reason="no score line")))
    ]
    return Group(
        id=group,
        iteration=0,
        prompt=Prompt(id=prompt, text=f"About {prompt}?"),
        responses=tuple(made),
        judgements=tuple(judgements),
        no_pair_reason="equal scores",
    )
