"""Losses against numbers derived by hand, packed rows against plain forwards of the separate sequences."""

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from rsrlm.losses import pair as pair_losses
from rsrlm.losses import two_views
from rsrlm.losses.base import Loss, Sums, loss_for, sequence_sums
from rsrlm.losses.packing import (
    ItemIds,
    TokenBatch,
    check_architecture,
    in_rows,
    pack,
    pad,
    response_logps,
    supports_packing,
)
from rsrlm.losses.pair import PairLoss, pair_means
from rsrlm.losses.schedule import lr_at
from rsrlm.losses.sft import TargetLoss, target_loss
from rsrlm.losses.two_views import TwoViewsLoss
from rsrlm.records import Example, PreferencePair, TwoViews
from rsrlm.settings.train import DPO, Distillation, TrainRule

pytestmark = pytest.mark.torch

VOCAB = 48
# initializer_range far above the usual 0.02: the log-probabilities of a tiny model then depend on all of the context.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = GPT2Config(
    vocab_size=VOCAB,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=64,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
)
PAIRS: list[ItemIds] = [
    ((5, 6, 7, 8), (9, 10, 11), (12, 13, 14, 15, 16)),
    ((17,), (18, 19), (20, 21, 22)),  # prompt of one token
    ((23, 24, 25), (26,), (27,)),  # responses of one token
    ((28, 29), (30, 31, 32, 33, 34, 35), (36,)),
    ((37, 38, 39, 40, 41), (42, 43), (42, 43, 44)),  # one response is a prefix of the other
]


def tiny(config: PreTrainedConfig, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny(LlamaConfig(**SIZES))


@pytest.fixture(params=["llama", "llama-tied", "gpt2", "qwen3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    configs = {
        "llama": LlamaConfig(**SIZES),
        "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
        "gpt2": GPT2,
        "qwen3": Qwen3Config(**SIZES, head_dim=8),
    }
    return tiny(configs[request.param])


def padded(pairs: list[ItemIds]) -> TokenBatch:
    return pad(pairs, pad_id=0)


def in_several_rows(pairs: list[ItemIds]) -> TokenBatch:
    return pack(pairs, row_tokens=12)


BUILDERS = pytest.mark.parametrize("build", [pack, in_several_rows, padded])


def plain_logps(model: PreTrainedModel, pairs: list[ItemIds]) -> Tensor:
    """The model's own forward on each sequence alone, with all logits."""
    logps = []
    for prompt, *responses in pairs:
        for response in responses:
            ids = torch.tensor([[*prompt, *response]])
            logps_TV = model(input_ids=ids).logits[0].float().log_softmax(-1)
            logps += [logps_TV[len(prompt) - 1 + i, token] for i, token in enumerate(response)]
    return torch.stack(logps)


def gradients(model: PreTrainedModel) -> list[Tensor]:
    """Takes the gradients away, so the next call starts at zero."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return grads


# ---- batches


@BUILDERS
def test_batch_holds_each_response_token_once_in_order(build: Callable[[list[ItemIds]], TokenBatch]) -> None:
    batch = build(PAIRS[:2])
    assert batch.target_R.tolist() == [9, 10, 11, 12, 13, 14, 15, 16, 18, 19, 20, 21, 22]
    assert batch.segment_R.tolist() == [0] * 3 + [1] * 5 + [2] * 2 + [3] * 3
    assert batch.length_S.tolist() == [3, 5, 2, 3]


def test_packed_rows_by_hand() -> None:
    """Of 7, 3 and 4 tokens in two rows: the longest has one, the others share the other."""
    # rows:      5 6 | 9 10 | 12 13 14      and     7 | 15 | 16 || 8 8 | 17 | 18
    # index:     0 1   2  3    4  5  6              7    8    9    10 11   12   13
    batch = pack([((5, 6), (9, 10), (12, 13, 14)), ((7,), (15,), (16,)), ((8, 8), (17,), (18,))], row_tokens=7)
    assert batch.input_ids.tolist() == [[5, 6, 9, 10, 12, 13, 14], [7, 15, 16, 8, 8, 17, 18]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4], [0, 1, 1, 0, 1, 2, 2]]
    # index 1, the last prompt token, predicts both 9 and 12; index 7 both 15 and 16; index 11 both 17 and 18
    assert batch.predict_R.tolist() == [1, 2, 1, 4, 5, 7, 7, 11, 11]
    assert batch.target_R.tolist() == [9, 10, 12, 13, 14, 15, 16, 17, 18]
    assert batch.attention_mask.dtype == torch.bool
    assert batch.attention_mask.shape == (2, 1, 7, 7)
    assert batch.attention_mask[:, 0].int().tolist() == [
        [
            [1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0],
            [1, 1, 0, 0, 1, 0, 0],
            [1, 1, 0, 0, 1, 1, 0],
            [1, 1, 0, 0, 1, 1, 1],
        ],
        [
            [1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0],
            [1, 0, 1, 0, 0, 0, 0],
            [0, 0, 0, 1, 0, 0, 0],
            [0, 0, 0, 1, 1, 0, 0],
            [0, 0, 0, 1, 1, 1, 0],
            [0, 0, 0, 1, 1, 0, 1],
        ],
    ]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(1, 60))
def test_rows_hold_each_item_once_and_are_about_as_long(lengths: list[int], row_tokens: int) -> None:
    rows = in_rows(lengths, row_tokens)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    filled = [sum(lengths[number] for number in row) for row in rows]
    assert max(filled) - min(filled) <= max(lengths)
    wanted = max(row_tokens, *lengths)
    assert len(rows) == 1 or 2 / 3 * wanted <= sum(filled) / len(rows)
    assert sum(filled) / len(rows) <= 1.5 * wanted


def test_padded_rows_by_hand() -> None:
    batch = pad([((5, 6), (9, 10), (12,))], pad_id=3)
    assert batch.input_ids.tolist() == [[5, 6, 9, 10], [5, 6, 12, 3]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.predict_R.tolist() == [1, 2, 4 + 1]


tokens = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5)
some_pairs = st.lists(st.tuples(tokens, tokens, tokens), min_size=1, max_size=4)


@settings(deadline=None)
@given(some_pairs, st.integers(5, 40))
def test_predicting_position_sees_exactly_the_prefix_of_its_sequence(pairs: list[ItemIds], row_tokens: int) -> None:
    batch = pack(pairs, row_tokens)
    assert batch.position_ids is not None
    width = batch.input_ids.shape[1]
    prefixes = [[*prompt, *response[:i]] for prompt, *both in pairs for response in both for i in range(len(response))]
    for predict, prefix in zip(batch.predict_R.tolist(), prefixes, strict=True):
        row, column = divmod(predict, width)
        sees = batch.attention_mask[row, 0, column]
        assert batch.input_ids[row, sees].tolist() == prefix
        assert batch.position_ids[row, sees].tolist() == list(range(len(prefix)))


@settings(deadline=None)
@given(some_pairs, st.integers(5, 40))
def test_mask_is_the_rule_cell_by_cell(pairs: list[ItemIds], row_tokens: int) -> None:
    batch = pack(pairs, row_tokens)
    assert batch.owner_2BT is not None
    for row, mask in zip(batch.owner_2BT.transpose(0, 1).tolist(), batch.attention_mask[:, 0].tolist(), strict=True):
        cells = list(zip(*row, strict=True))
        assert mask == [
            [k <= q and pair_k == pair_q and branch_k in (0, branch_q) for k, (pair_k, branch_k) in enumerate(cells)]
            for q, (pair_q, branch_q) in enumerate(cells)
        ]
        assert all(any(sees) for sees in mask)  # padding too: a softmax over nothing is no number


@settings(deadline=None)
@given(some_pairs)
def test_padded_predicting_position_ends_the_prefix_of_its_sequence(pairs: list[ItemIds]) -> None:
    batch = padded(pairs)
    width = batch.input_ids.shape[1]
    prefixes = [[*prompt, *response[:i]] for prompt, *both in pairs for response in both for i in range(len(response))]
    for predict, sequence, prefix in zip(batch.predict_R.tolist(), batch.segment_R.tolist(), prefixes, strict=True):
        row, column = divmod(predict, width)
        assert row == sequence
        assert batch.input_ids[row, : column + 1].tolist() == prefix
        assert batch.attention_mask[row, : column + 1].all()


@BUILDERS
@pytest.mark.parametrize("empty", [0, 1, 2])
def test_empty_part_is_refused(build: Callable[[list[ItemIds]], TokenBatch], empty: int) -> None:
    parts: list[tuple[int, ...]] = [(5,), (6,), (7,)]
    parts[empty] = ()
    with pytest.raises(ValueError, match="at least one token"):
        build([(parts[0], parts[1], parts[2])])


def test_packed_examples_by_hand() -> None:
    """The second fills its row with padding, which sees itself, and which nobody else sees."""
    batch = pack([((5, 6), (9, 10)), ((7,), (15,))], row_tokens=4)
    assert batch.input_ids.tolist() == [[5, 6, 9, 10], [7, 15, 0, 0]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch.predict_R.tolist() == [1, 2, 4]
    assert batch.target_R.tolist() == [9, 10, 15]
    assert batch.segment_R.tolist() == [0, 0, 1]
    assert batch.length_S.tolist() == [2, 1]
    assert batch.attention_mask[:, 0].int().tolist() == [
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]],
    ]


def test_padded_examples_by_hand() -> None:
    batch = pad([((5, 6), (9, 10)), ((7,), (15,))], pad_id=3)
    assert batch.input_ids.tolist() == [[5, 6, 9, 10], [7, 15, 3, 3]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.predict_R.tolist() == [1, 2, 4]
    assert batch.segment_R.tolist() == [0, 0, 1]


def test_examples_have_the_logps_of_each_alone(llama: PreTrainedModel) -> None:
    examples = [(prompt, chosen) for prompt, chosen, _ in PAIRS]
    with torch.no_grad():
        alone = torch.cat([response_logps(llama, pad([one], pad_id=0)) for one in examples])
        for batch in (pack(examples), pack(examples, row_tokens=8), pad(examples, pad_id=0)):
            assert torch.allclose(response_logps(llama, batch), alone, atol=1e-5)


def test_target_loss_is_a_sum_over_tokens() -> None:
    found = target_loss(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 0, 1]), torch.tensor([1.0, 0.0]))
    assert found.loss == 3.0
    sums = {name: float(value) for name, value in found.sums.items()}
    assert sums == {"loss": 3.0, "tokens_trained": 2.0, "examples": 1.0}
    assert not found.each


def test_sums_have_the_dtype_of_the_log_probabilities() -> None:
    """Whatever that of the weights: all sums of a step are reduced as one tensor."""
    logps = torch.tensor([-1.0, -2.0, -4.0], dtype=torch.float64)
    found = target_loss(logps, torch.tensor([0, 0, 1]), torch.tensor([1, 0]))
    assert {value.dtype for value in found.sums.values()} == {torch.float64}
    found = pair_loss(logps, logps, HAND, torch.tensor([1]), beta=0.1)
    assert {value.dtype for value in found.sums.values()} == {torch.float64}


def test_to_moves_every_tensor() -> None:
    for batch in (pack(PAIRS).to("meta"), padded(PAIRS).to("meta")):
        fields = [getattr(batch, name) for name in TokenBatch.__slots__]
        assert all(field is None or field.device.type == "meta" for field in fields)


# ---- log-probabilities


@BUILDERS
def test_logps_equal_the_plain_forward_of_each_sequence(
    model: PreTrainedModel, build: Callable[[list[ItemIds]], TokenBatch]
) -> None:
    with torch.no_grad():
        logps_R = response_logps(model, build(PAIRS))
        torch.testing.assert_close(logps_R, plain_logps(model, PAIRS), rtol=1e-5, atol=1e-5)
    assert logps_R.dtype == torch.float32
    assert logps_R.std() > 0.5  # else any context would do


@BUILDERS
@pytest.mark.parametrize("chunk", [1, 4, 512])
def test_chunked_gradients_equal_those_of_the_plain_forward(
    llama: PreTrainedModel, build: Callable[[list[ItemIds]], TokenBatch], chunk: int
) -> None:
    weights = torch.linspace(-1, 1, len(pack(PAIRS).target_R))
    (plain_logps(llama, PAIRS) * weights).sum().backward()
    expected = gradients(llama)
    (response_logps(llama, build(PAIRS), chunk=chunk) * weights).sum().backward()
    torch.testing.assert_close(gradients(llama), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def head_rows(llama: PreTrainedModel) -> Iterator[list[int]]:
    """Rows of every call of the output embedding."""
    rows: list[int] = []
    hook = llama.get_output_embeddings().register_forward_hook(lambda _, inputs, output: rows.append(len(inputs[0])))
    yield rows
    hook.remove()


def test_head_sees_only_predicting_positions_in_chunks(llama: PreTrainedModel, head_rows: list[int]) -> None:
    batch = pack(PAIRS)
    logps_R = response_logps(llama, batch, chunk=10)
    assert len(logps_R) == 27  # 8 + 5 + 2 + 7 + 5 response tokens of 42 in the row
    assert head_rows == [9, 9, 9]
    logps_R.sum().backward()
    assert head_rows == [9] * 6  # logits are computed again, not kept
    llama.zero_grad(set_to_none=True)


def test_fixed_number_of_chunks_may_exceed_the_tokens(llama: PreTrainedModel, head_rows: list[int]) -> None:
    batch = pack(PAIRS[2:3])
    with torch.no_grad():
        logps_R = response_logps(llama, batch, num_chunks=5)
        assert head_rows == [1, 1, 0, 0, 0]
        torch.testing.assert_close(logps_R, response_logps(llama, batch))
    response_logps(llama, batch, num_chunks=5).sum().backward()
    assert len(gradients(llama)) == len(list(llama.parameters()))


def test_supported_architectures_pack(model: PreTrainedModel) -> None:
    model.train()
    check_architecture(model)
    assert supports_packing(model)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_low_precision_packs(llama: PreTrainedModel) -> None:
    model = copy.deepcopy(llama).to(torch.bfloat16)
    check_architecture(model)
    assert supports_packing(model)


def test_wrong_mask_is_no_rounding_in_low_precision() -> None:
    # bfloat16 may be off by 8 * 2^-7 of 4 nats = 0.25; all the context of this model moves its values by 0.2 only
    model = tiny(LlamaConfig(**{**SIZES, "initializer_range": 0.02}), "eager").to(torch.bfloat16)
    assert not supports_packing(model)


def test_usual_initialisation_packs() -> None:
    assert supports_packing(tiny(LlamaConfig(**{**SIZES, "initializer_range": 0.02})))


@pytest.mark.parametrize(
    ("config", "attention"),
    [
        (LlamaConfig(**SIZES), "eager"),  # adds a bool mask to the scores
        (LlamaConfig(**{**SIZES, "initializer_range": 0.02}), "eager"),  # a difference that is small in absolute terms
        (MistralConfig(**SIZES, sliding_window=4096), "sdpa"),  # a 4D mask loses the window
        (Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=64, max_window_layers=1), "sdpa"),
        (
            GPTNeoConfig(
                vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
            ),
            "eager",
        ),
        (BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4), "eager"),  # positions from a 2D mask
    ],
    ids=["eager", "eager-small", "mistral-window", "qwen3-window", "gpt-neo-local", "bloom-alibi"],
)
def test_other_architectures_do_not_pack_but_pad(config: PreTrainedConfig, attention: str) -> None:
    model = tiny(config, attention)
    check_architecture(model)
    assert not supports_packing(model)
    with torch.no_grad():
        torch.testing.assert_close(
            response_logps(model, padded(PAIRS)), plain_logps(model, PAIRS), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (Gemma2Config(**SIZES, head_dim=8), "final_logit_softcapping"),
        (GraniteConfig(**SIZES, logits_scaling=8.0), "logits_scaling"),
        (CohereConfig(**SIZES), "logit_scale"),
    ],
    ids=["gemma2", "granite", "cohere"],
)
def test_changed_logits_are_refused_by_name(config: PreTrainedConfig, setting: str) -> None:
    with pytest.raises(ValueError, match=setting):
        check_architecture(tiny(config))


def test_trivial_logit_settings_are_fine() -> None:
    check_architecture(tiny(GraniteConfig(**SIZES, logits_scaling=1.0)))
    check_architecture(tiny(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=None)))


def test_changed_logits_without_a_known_setting_are_refused(llama: PreTrainedModel) -> None:
    model = copy.deepcopy(llama)
    model.register_forward_hook(lambda module, inputs, output: setattr(output, "logits", output.logits * 1.1))
    with pytest.raises(ValueError, match="does more to its logits"):
        check_architecture(model)


def test_model_without_a_head_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="causal language model"):
        check_architecture(llama.model)


# ---- losses by hand


def pair_loss(
    logps_R: Tensor,
    ref_R: Tensor,
    batch: TokenBatch,
    counted_P: Tensor,
    weights: Sequence[float] | None = None,
    targets: Sequence[float] | None = None,
    scores: Sequence[float] | None = None,
    **options: Any,
) -> Sums:
    """Of pairs of weight 1, target 1 and scores 1 and 0 unless others are given; options are those of the train
    section."""
    ones = [1.0] * len(counted_P)
    train = DPO(lr=1e-3, pairs_per_step=1).model_copy(update=options)
    given = (weights or ones, targets or ones, scores or [1.0, 0.0] * len(counted_P))
    weight_P, target_P, score_S = (logps_R.new_tensor(values) for values in given)
    labels = pair_losses.Labels(weight_P=weight_P, target_P=target_P, score_S=score_S)
    return pair_losses.pair_loss(logps_R, ref_R, batch, counted_P, labels, train)


#
# One pair. chosen: two tokens, policy -1 and -2, reference -1.5 and -2.5: log-ratio (-3) - (-4) = +1.
# rejected: one token, policy -3, reference -2: log-ratio -1. So h = 1 - (-1) = 2.

HAND = pack([((5, 6), (7, 8), (9,))])
LOGPS = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
REF = torch.tensor([-1.5, -2.5, -2.0], dtype=torch.float64)
ONE = torch.ones(1, dtype=torch.float64)


def by_hand(logps: Tensor = LOGPS, ref: Tensor = REF, beta: float = 0.5, **options: Any) -> Sums:
    return pair_loss(logps, ref, HAND, ONE, beta=beta, **options)


def test_sequence_sums() -> None:
    # 1 + 2, nothing, 3 + 4 + 5
    sums = sequence_sums(torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([0, 0, 2, 2, 2]), 3)
    assert sums.tolist() == [3, 0, 12]


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 50.0])
def test_dpo_is_ln_2_at_zero_margin_for_any_beta(beta: float) -> None:
    result = by_hand(ref=LOGPS, beta=beta)  # -log sigmoid(0) = ln 2
    assert result.loss.item() == pytest.approx(0.6931471805599453, abs=1e-12)


def test_dpo_value() -> None:
    # beta h = 0.5 * 2 = 1; -log sigmoid(1) = ln(1 + e^-1) = ln 1.3678794 = 0.3132617
    assert by_hand().loss.item() == pytest.approx(0.31326168751822286, abs=1e-12)


def test_ipo_values() -> None:
    # h = 0: (0 - 1 / (2 * 0.25))^2 = 2^2; h = 2 is the minimum of beta 0.25; h = 2, beta 0.5: (2 - 1)^2
    assert by_hand(ref=LOGPS, loss="ipo", beta=0.25).loss.item() == pytest.approx(4, abs=1e-12)
    assert by_hand(loss="ipo", beta=0.25).loss.item() == pytest.approx(0, abs=1e-12)
    assert by_hand(loss="ipo", beta=0.5).loss.item() == pytest.approx(1, abs=1e-12)


def test_nll_is_per_token_of_the_chosen() -> None:
    # (1 + 2) / 2 = 1.5 nats per token, times 2, beside the loss above
    result = by_hand(nll_scale=2.0)
    assert result.loss.item() == pytest.approx(0.31326168751822286 + 3, abs=1e-12)
    assert result.sums["nll"].item() == pytest.approx(1.5)


def test_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="no loss"):
        by_hand(loss="hinge")


def test_sums_by_hand() -> None:
    sums = by_hand().sums
    assert sums["loss"].item() == pytest.approx(0.31326168751822286)
    assert sums["pairs"] == 1
    assert sums["accuracy"] == 1
    assert sums["margin"].item() == pytest.approx(1)  # beta h
    assert sums["chosen_logp"] == -3
    assert sums["rejected_logp"] == -3
    # chosen tokens: r = 0.5 twice, e^0.5 - 1.5 = 0.1487213; rejected: r = -1, e^-1 - 1 + 1 = 0.3678794
    assert sums["kl"].item() == pytest.approx(2 * 0.1487212707 + 0.3678794412, abs=1e-9)
    assert sums["kl_tokens"] == 3
    assert torch.stack([*sums.values()]).dtype == torch.float64
    assert not any(value.requires_grad for value in by_hand(LOGPS.clone().requires_grad_()).sums.values())


def test_each_pair_by_hand() -> None:
    """Log-ratios of the first pair +1 and -1, so h = 2; of the second +0.5 and +0.25, so h = 0.25."""
    batch = pack([((5, 6), (7, 8), (9,)), ((5,), (10,), (11, 12))])
    logps = torch.tensor([-1.0, -2.0, -4.0, -0.5, -2.0, -1.0], dtype=torch.float64)
    ref = torch.tensor([-1.5, -2.5, -3.0, -1.0, -2.0, -1.25], dtype=torch.float64)
    result = pair_loss(logps, ref, batch, torch.ones(2), beta=0.5, nll_scale=2.0)
    expected = {
        # ln(1 + e^-1) + 2 * 1.5, ln(1 + e^-0.125) + 2 * 0.5
        "loss": [0.3132616875 + 3, 0.6325990353 + 1],
        "dpo_loss": [0.3132616875, 0.6325990353],
        "pairs": [1, 1],
        "accuracy": [1, 1],
        "margin": [1, 0.125],
        "chosen_logp": [-3, -0.5],
        "rejected_logp": [-4, -3],
        "nll": [1.5, 0.5],
    }
    assert list(result.each) == list(expected)
    for name, values in expected.items():
        assert result.each[name].tolist() == pytest.approx(values, abs=1e-9)
        assert result.sums[name].item() == pytest.approx(sum(values), abs=1e-9)
    assert result.loss.item() == pytest.approx(result.sums["loss"].item(), abs=1e-12)
    left_out = pair_loss(logps, ref, batch, torch.tensor([0.0, 1.0]), beta=0.5, nll_scale=2.0)
    for name, values in expected.items():
        assert left_out.each[name].tolist() == pytest.approx([0, values[1]], abs=1e-9)
    assert left_out.sums["kl_tokens"] == 3


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "sppo"])
def test_the_weight_of_a_pair_multiplies_its_loss_alone(loss: str) -> None:
    """NLL included; the number of pairs, which the step's loss is divided by, and the other figures stay."""
    batch, logps, ref, counted = pack(PAIRS[:3]), *two_random(15), torch.ones(3, dtype=torch.float64)
    plain = pair_loss(logps, ref, batch, counted, beta=0.5, loss=loss, nll_scale=2.0)
    weighted = pair_loss(logps, ref, batch, counted, weights=(2, 0, 0.25), beta=0.5, loss=loss, nll_scale=2.0)
    for name in ("loss", "dpo_loss"):
        expected = [x * w for x, w in zip(plain.each[name].tolist(), (2, 0, 0.25), strict=True)]
        assert weighted.each[name].tolist() == pytest.approx(expected, abs=1e-12)
        assert weighted.sums[name].item() == pytest.approx(sum(expected), abs=1e-12)
    assert weighted.loss.item() == pytest.approx(weighted.sums["loss"].item(), abs=1e-12)
    for name in set(plain.sums) - {"loss", "dpo_loss"}:
        assert weighted.sums[name] == plain.sums[name]
    dummy = pair_loss(logps, ref, batch, torch.tensor([1, 0, 0]), weights=(2, 3, 4), beta=0.5, loss=loss)
    assert dummy.each["loss"].tolist()[1:] == [0, 0]


def two_random(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logps, ref = -3 * torch.rand(2, count, generator=generator, dtype=torch.float64)
    return logps, ref


@pytest.mark.parametrize(
    ("target", "options", "expected"),
    [
        (1.0, {}, 0.31326168751822286),  # a certain label: the loss without a target
        (0.0, {}, 1.31326168751822286),  # a label that is wrong: -log sigmoid(-1)
        (0.75, {}, 0.56326168751822286),  # 0.75 * 0.3132617 + 0.25 * 1.3132617
        (0.5, {}, 0.81326168751822286),
        (1.0, {"loss": "ipo"}, 1.0),
        (0.0, {"loss": "ipo"}, 9.0),  # (-2 - 1)^2
        (0.75, {"loss": "ipo"}, 3.0),
    ],
)
def test_a_target_is_the_probability_of_the_label(target: float, options: dict[str, Any], expected: float) -> None:
    assert by_hand(targets=[target], **options).loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("logps", "expected"),
    [
        ((-1.0, -2.0, -3.0), 41_596.4),  # both ratios 0: 1000^2 (.2040^2 + .2040^2) / 2
        ((0.0, -1.0, -4.0), 40_987.0),  # ratios 2 and -1: half of 201.952^2 + 202.952^2
    ],
)
def test_win_rates_are_goals_of_the_ratios(logps: tuple[float, ...], expected: float) -> None:
    """SPPO: scores 1, 0 and -1 give win rates .7040 and .2960, so goals of 203.952 and -203.952 with beta .001."""
    win = (0.5 + 0.7310585786 + 0.8807970780) / 3
    options: dict[str, Any] = {"loss": "sppo", "beta": 0.001, "scores": [win, 1 - win]}
    found = by_hand(torch.tensor(logps, dtype=torch.float64), LOGPS, **options)
    assert found.loss.item() == pytest.approx(expected, abs=0.05)
    assert found.sums["margin"].item() == pytest.approx(0.001 * (0 if expected > 41_000 else 3))


def test_weight_target_and_likelihood_together() -> None:
    # 3 * (0.5632617 + 2 * 1.5)
    found = by_hand(targets=[0.75], weights=[3.0], nll_scale=2.0)
    assert found.loss.item() == pytest.approx(3 * (0.5632616875 + 3), abs=1e-9)
    assert found.sums["dpo_loss"].item() == pytest.approx(3 * 0.5632616875, abs=1e-9)


def test_a_target_of_zero_is_the_pair_the_other_way_round() -> None:
    turned = pack([((5, 6), (9,), (7, 8))])
    other = [2, 0, 1]
    for loss in ("sigmoid", "ipo"):
        found = pair_loss(LOGPS[other], REF[other], turned, ONE, targets=[0.25], beta=0.5, loss=loss)
        assert found.loss.item() == pytest.approx(by_hand(targets=[0.75], loss=loss).loss.item(), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_pairs_of_weight_one_have_the_papers_loss_to_the_bit(dtype: torch.dtype) -> None:
    """Loss and gradient as without weights and targets, for each loss."""
    batch = pack(PAIRS)
    logps, ref = (values.to(dtype) for values in two_random(27))
    counted = torch.tensor([1, 1, 0, 1, 1], dtype=dtype)
    for loss in ("sigmoid", "ipo"):
        ours, plain = (logps.clone().requires_grad_() for _ in range(2))
        ratios = [sequence_sums(values, batch.segment_R, 10) for values in (plain, ref)]
        ratio = ratios[0] - ratios[1]
        h = ratio[0::2] - ratio[1::2]
        beta = 0.3
        each = -logsigmoid(beta * h) if loss == "sigmoid" else (h - 1 / (2 * beta)) ** 2
        nll = -ratios[0][0::2] / batch.length_S[0::2]
        expected = (counted * (each + 0.7 * nll)).sum()
        expected.backward()
        found = pair_loss(ours, ref, batch, counted, beta=beta, loss=loss, nll_scale=0.7)
        found.loss.backward()
        assert torch.equal(found.loss, expected)
        assert ours.grad is not None
        assert plain.grad is not None
        assert torch.equal(ours.grad, plain.grad)


def test_ties_and_lost_pairs_are_not_accurate() -> None:
    assert by_hand(ref=LOGPS).sums["accuracy"] == 0
    assert by_hand(ref=LOGPS + torch.tensor([1.0, 1.0, 0.0])).sums["accuracy"] == 0


def test_kl_is_exact_for_tokens_in_the_reference_s_proportions() -> None:
    # reference 1/2, 1/4, 1/4 and tokens a a b c; policy 1/4, 1/4, 1/2.
    # KL(ref || policy) = 1/2 ln 2 + 1/4 ln 1 + 1/4 ln 1/2 = 1/4 ln 2
    ref = torch.tensor([1 / 2, 1 / 2, 1 / 4, 1 / 4], dtype=torch.float64).log()
    policy = torch.tensor([1 / 4, 1 / 4, 1 / 4, 1 / 2], dtype=torch.float64).log()
    sums = pair_loss(policy, ref, pack([((5,), (6, 6), (7, 8))]), ONE, beta=0.1).sums
    assert (sums["kl"] / sums["kl_tokens"]).item() == pytest.approx(math.log(2) / 4, abs=1e-12)


def test_gradient_raises_chosen_and_lowers_rejected() -> None:
    # at h = 0 the slope of -log sigmoid(beta h) in h is -beta / 2; each token of a response has the same
    logps = LOGPS.clone().requires_grad_()
    by_hand(logps, ref=LOGPS, beta=0.5).loss.backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([-0.25, -0.25, 0.25])
    # the nll adds -1 / 2 to each of the two chosen tokens
    logps = LOGPS.clone().requires_grad_()
    by_hand(logps, ref=LOGPS, beta=0.5, nll_scale=1.0).loss.backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([-0.25 - 0.5, -0.25 - 0.5, 0.25])
    # ipo at h = 0: 2 (0 - 1 / (2 * 0.5)) = -2
    logps = LOGPS.clone().requires_grad_()
    by_hand(logps, ref=LOGPS, beta=0.5, loss="ipo").loss.backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([-2, -2, 2])


def test_means_of_a_step_and_of_each_kind_by_hand() -> None:
    summed = {
        "loss": 6.0,
        "pairs": 4.0,
        "margin": 2.0,
        "kl": 3.0,
        "kl_tokens": 12.0,
        "judge/loss": 1.0,
        "judge/pairs": 2.0,
    }
    assert pair_means(summed) == {
        "loss": 1.5, "pairs": 4.0, "margin": 0.5, "kl_per_token": 0.25, "judge/loss": 0.5, "judge/pairs": 2.0,
    }  # fmt: skip
    assert math.isnan(pair_means({"pairs": 1.0, "kl": 0.0, "kl_tokens": 0.0})["kl_per_token"])


# ---- one loss for each type of item

TRAIN = DPO(lr=1e-3, pairs_per_step=1, beta=0.5)
PAIR = PreferencePair(
    id="00/p/1>0", prompt_id="p", kind="actor", chosen_id="c", rejected_id="r", prompt_token_ids=(5, 6),
    chosen_token_ids=(7, 8), rejected_token_ids=(9,), chosen_score=1.0, rejected_score=0.0, weight_version="M0",
)  # fmt: skip
EXAMPLE = Example(id="e", kind="ift", prompt_token_ids=(5, 6), target_token_ids=(7, 8))


def ids_of(loss: Loss, item: Any) -> list[Sequence[int]]:
    return [getattr(item, name) for name in (loss.prompt, *loss.responses)]


def test_the_loss_of_pairs() -> None:
    loss = loss_for(PreferencePair, TRAIN)
    assert isinstance(loss, PairLoss)
    assert ids_of(loss, PAIR) == [(5, 6), (7, 8), (9,)]
    assert loss.needs_reference
    assert loss.denominator(3, 20) == 3
    with pytest.raises(TypeError, match="not by TrainRule"):
        loss_for(PreferencePair, TrainRule(lr=1e-3, pairs_per_step=1))
    pair = replace(PAIR, weight=3.0, target=0.75)
    found = loss.sums(LOGPS, REF, HAND, [pair], ONE)
    assert torch.equal(found.loss, by_hand(weights=[3.0], targets=[0.75]).loss)
    assert loss.means({"pairs": 2.0, "loss": 3.0}) == {"pairs": 2.0, "loss": 1.5}


def test_the_loss_of_examples() -> None:
    loss = loss_for(Example, TRAIN)
    assert isinstance(loss, TargetLoss)
    assert ids_of(loss, EXAMPLE) == [(5, 6), (7, 8)]
    assert not loss.needs_reference
    assert loss.denominator(3, 20) == 20
    found = loss.sums(torch.tensor([-1.0, -2.0]), None, pack([((5, 6), (7, 8))]), [EXAMPLE], torch.ones(1))
    assert found.loss == 3.0
    summed = {name: float(value) for name, value in found.sums.items()}
    assert loss.means(summed) == {"loss": 1.5, "sft_loss": 1.5, "examples": 1.0, "tokens_trained": 2.0}


VIEWS = TwoViews(
    id="v", kind="self_j", teacher_token_ids=(5, 6), student_token_ids=(5,), label_token_ids=(8, 9), label=0
)


def test_the_loss_of_two_views_by_hand() -> None:
    """Teacher .7 and .3, student .4 and .6: .3567 + .3 x .9163 + 2 x .1838."""
    logps = torch.tensor([0.7, 0.3, 0.4, 0.6], dtype=torch.float64).log().requires_grad_()
    loss = loss_for(TwoViews, Distillation(lr=1e-3, pairs_per_step=1))
    assert isinstance(loss, TwoViewsLoss)
    assert loss.layout(VIEWS) == [[(5, 6), (8,), (9,)], [(5,), (8,), (9,)]]
    assert not loss.needs_reference
    batch = pack(loss.layout(VIEWS))
    found = loss.sums(logps, None, batch, [VIEWS], torch.ones(1))
    assert found.loss.item() == pytest.approx(0.9991, abs=5e-5)
    parts = {"teacher_ce": 0.3567, "student_ce": 0.9163, "kl": 0.1838, "student_right": 0, "examples": 1}
    assert {name: found.sums[name].item() for name in parts} == pytest.approx(parts, abs=5e-5)
    found.loss.backward()
    # The teacher learns from its own label alone: d(-log p0) = -1 there. The student: -.3 - 2 x .7, and -2 x .3.
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([-1, 0, -1.7, -0.6], abs=1e-9)
    none = loss.sums(logps, None, batch, [VIEWS], torch.zeros(1))
    assert (none.loss.item(), none.sums["examples"].item()) == (0, 0)
    means = loss.means({"loss": 3.0, "kl": 1.0, "examples": 2.0})
    assert means == {"loss": 1.5, "kl": 0.5, "sft_loss": 1.5, "examples": 2.0}
    assert loss.denominator(3, 60) == 3
    with pytest.raises(TypeError, match="not by DPO"):
        loss_for(TwoViews, TRAIN)


def test_what_is_no_label_is_one_more_outcome() -> None:
    """Teacher .5, .3 and .2 elsewhere; student .5, .1 and .4 elsewhere."""
    logps = torch.tensor([[[0.5, 0.3], [0.5, 0.1]]], dtype=torch.float64).log()
    rule = Distillation(lr=1e-3, pairs_per_step=1)
    found = two_views.distillation(logps, torch.tensor([0]), torch.ones(1), rule)
    assert found.sums["kl"].item() == pytest.approx(0.3 * math.log(3) - 0.2 * math.log(2), abs=1e-9)
    assert found.sums["student_right"].item() == 1


def test_two_views_of_a_real_model(llama: PreTrainedModel) -> None:
    """Packed, the labels of both views have the log-probabilities of the next token after each prompt."""
    loss = loss_for(TwoViews, Distillation(lr=1e-3, pairs_per_step=1))
    with torch.no_grad():
        logps = response_logps(llama, pack(loss.layout(VIEWS)))
        expected = [llama(torch.tensor([list(ids)])).logits[0, -1].log_softmax(-1)[[8, 9]] for ids in ((5, 6), (5,))]
    assert torch.allclose(logps, torch.cat(expected), atol=1e-5)


def test_a_loss_beside_the_items_that_it_learns_from_is_found() -> None:
    class Thought(Example):
        pass

    with pytest.raises(LookupError, match="0 losses learn from Thought"):
        loss_for(Thought, TRAIN)

    class ThoughtLoss(TargetLoss):
        item = Thought

    assert type(loss_for(Thought, TRAIN)) is ThoughtLoss
    assert type(loss_for(Example, TRAIN)) is TargetLoss


# ---- invariances

OPTIONS = [
    {"beta": 0.1},
    {"beta": 0.3, "nll_scale": 0.5},
    {"beta": 0.2, "loss": "ipo"},
    {"beta": 0.2, "loss": "sppo"},
]


def step(
    model: PreTrainedModel,
    pairs: list[ItemIds],
    size: int,
    build: Callable[[list[ItemIds]], TokenBatch],
    options: dict[str, object],
    weights: list[int] | None = None,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Sums and gradients of one step in micro-batches of `size`. The reference is a fixed function of the token."""
    sums: dict[str, Tensor] = {}
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        batch = build(part)
        weight_P = torch.tensor((weights or [1] * len(pairs))[start : start + size])
        ref_logps_R = -3 - torch.sin(batch.target_R.float())
        result = pair_loss(response_logps(model, batch), ref_logps_R, batch, weight_P, **options)
        result.loss.backward()
        sums = {name: sums.get(name, 0) + value for name, value in result.sums.items()}
    return sums, gradients(model)


@BUILDERS
@pytest.mark.parametrize("options", OPTIONS, ids=["dpo", "nll", "ipo", "sppo"])
def test_sums_do_not_depend_on_micro_batches_or_order(
    llama: PreTrainedModel, build: Callable[[list[ItemIds]], TokenBatch], options: dict[str, object]
) -> None:
    model = copy.deepcopy(llama).double()
    sums, grads = step(model, PAIRS, 5, pack, options)
    assert sums["pairs"] == 5
    for size in (1, 2, 5):
        shuffled = random.Random(size).sample(PAIRS, len(PAIRS))
        other_sums, other_grads = step(model, shuffled, size, build, options)
        torch.testing.assert_close(other_sums, sums, rtol=1e-5, atol=1e-5)
        # The last float32 step, from logits to log-probabilities, is what rounds.
        torch.testing.assert_close(other_grads, grads, rtol=1e-4, atol=1e-6)


@BUILDERS
def test_dummy_pairs_add_nothing(llama: PreTrainedModel, build: Callable[[list[ItemIds]], TokenBatch]) -> None:
    options: dict[str, object] = {"beta": 0.3, "nll_scale": 0.5}
    sums, grads = step(llama, PAIRS[:2], 2, build, options)
    with_dummies = [PAIRS[3], PAIRS[0], PAIRS[4], PAIRS[1]]
    other_sums, other_grads = step(llama, with_dummies, 4, build, options, weights=[0, 1, 0, 1])
    torch.testing.assert_close(other_sums, sums, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other_grads, grads, rtol=1e-4, atol=1e-5)
    sums, grads = step(llama, PAIRS, 5, build, options, weights=[0] * 5)
    assert all(value == 0 for value in sums.values())
    assert len(grads) == len(list(llama.parameters()))  # ranks stay in step: every parameter has a gradient
    assert all((grad == 0).all() for grad in grads)


# ---- learning rate


def test_cosine_and_linear_by_hand() -> None:
    # 11 steps: step 5 is half way, the mean of both ends; step 10 is the last
    for schedule in ("cosine", "linear"):
        rates = [lr_at(s, 11, lr=1e-6, lr_final=1e-7, warmup_steps=0, schedule=schedule) for s in range(12)]
        assert rates[0] == 1e-6
        assert rates[5] == pytest.approx(5.5e-7)
        assert rates[10] == rates[11] == pytest.approx(1e-7)
        # two steps: the first and the last
        assert lr_at(1, 2, lr=1e-6, lr_final=1e-7, warmup_steps=0, schedule=schedule) == pytest.approx(1e-7)
    # a quarter of the way: linear 1 - 1/4; cosine (1 + cos 45 degrees) / 2 = 0.8535534
    options = {"lr": 1.0, "lr_final": 0.0, "warmup_steps": 0}
    assert lr_at(2, 9, **options, schedule="linear") == pytest.approx(0.75)
    assert lr_at(2, 9, **options, schedule="cosine") == pytest.approx(0.8535534)


def test_warm_up_by_hand() -> None:
    # 3 steps of warm-up: 1/4, 2/4, 3/4, then lr
    for schedule in ("cosine", "linear", "constant"):
        rates = [lr_at(s, 8, lr=4.0, lr_final=1.0, warmup_steps=3, schedule=schedule) for s in range(8)]
        assert rates[:4] == [1, 2, 3, 4]
        assert rates[7] == (4 if schedule == "constant" else 1)


def test_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="no schedule"):
        lr_at(5, 10, lr=1.0, lr_final=0.0, warmup_steps=0, schedule="square")


@settings(deadline=None)
@given(
    total=st.integers(1, 60),
    warmup=st.integers(0, 70),
    lr=st.floats(1e-8, 1.0),
    share=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_rate_rises_then_falls_within_its_bounds(
    total: int, warmup: int, lr: float, share: float, schedule: str
) -> None:
    lr_final = lr * share
    rates = [lr_at(s, total, lr=lr, lr_final=lr_final, warmup_steps=warmup, schedule=schedule) for s in range(total)]
    slack = 1e-12 * lr
    assert all(0 < rate <= lr + slack for rate in rates if lr_final > 0 or rate != rates[-1])
    assert all(later > earlier for earlier, later in pairwise(rates[: warmup + 1]))
    assert all(later <= earlier + slack for earlier, later in pairwise(rates[warmup:]))
    assert all(rate >= lr_final - slack for rate in rates[warmup:])
    if warmup < total:
        assert rates[warmup] == lr
    if warmup < total - 1 and schedule != "constant":
        assert rates[-1] == pytest.approx(lr_final)
