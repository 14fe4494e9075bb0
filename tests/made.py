"""Responses by hand for the tests of recipes."""

from rsrlm.records import Response, Sampling


def response(
    index: int, text: str = "words", *, cut: bool = False, tokens: tuple[int, ...] | None = None, model: str = "M1"
) -> Response:
    """Response `index` to the prompt "tea" in iteration 1, with tokens of its own unless `tokens` are given."""
    return Response(
        id=f"01/tea/{index}", prompt_id="tea", index=index, role="actor", text=text,
        token_ids=(100 + index, 2) if tokens is None else tokens, prompt_token_ids=(1, 9),
        finish_reason="length" if cut else "stop", weight_version=model,
        sampling=Sampling(temperature=0.8, top_p=1.0, max_tokens=8, seed=1),
    )  # fmt: skip
