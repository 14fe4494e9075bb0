"""Preference pairs as model input, and the log-probabilities of their response tokens.

Shapes in names: B rows, T tokens of a row, P pairs, S = 2P sequences (2p is the chosen response of pair p, 2p+1 its
rejected one), R response tokens of all sequences in that order, C of them in one chunk, H hidden size, V vocabulary.

Packing puts all pairs in one row and every prompt there once (prefix sharing, arXiv 2410.20305). Only the predicting
positions go through the output embedding, in checkpointed chunks, so logits of the size [B, T, V] never exist.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PairIds = tuple[Sequence[int], Sequence[int], Sequence[int]]  # token ids of prompt, chosen and rejected
ExampleIds = tuple[Sequence[int], Sequence[int]]  # token ids of prompt and target

PROMPT, CHOSEN, REJECTED = 0, 1, 2

# What the heads of some models do to their logits (Gemma, Granite, Cohere, Falcon-H1); None and 1 do nothing.
LOGIT_SETTINGS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch:
    """P pairs (or S examples) of one micro-batch, packed or padded. What ends in R or S is the same in both forms.

    input_ids: [B, T] token ids; B is 1 packed and 2P padded.
    position_ids: [B, T] packed; None padded, where the model's own positions are right.
    attention_mask: bool [1, 1, T, T] packed (True: the query, third, sees the key, last); int64 [B, T] padded.
    predict_R: index into the hidden states, flattened to [B * T, H], that predicts each response token.
    target_R: id of each response token.
    segment_R: the sequence that each response token belongs to, 0..2P-1, ascending.
    length_S: response tokens of each sequence.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor
    predict_R: Tensor
    target_R: Tensor
    segment_R: Tensor
    length_S: Tensor

    @property
    def num_pairs(self) -> int:
        return len(self.length_S) // 2

    def to(self, device: torch.device | str) -> "PairBatch":
        positions = None if self.position_ids is None else self.position_ids.to(device)
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=positions,
            attention_mask=self.attention_mask.to(device),
            predict_R=self.predict_R.to(device),
            target_R=self.target_R.to(device),
            segment_R=self.segment_R.to(device),
            length_S=self.length_S.to(device),
        )


def pack_pairs(pairs: Sequence[PairIds]) -> PairBatch:
    """All pairs in one row, each as prompt, chosen, rejected; both responses start at position len(prompt).

    The last token of the prompt predicts the first token of both responses.
    """
    ids: list[int] = []
    positions: list[int] = []
    pair: list[int] = []
    branch: list[int] = []
    predict: list[int] = []
    for p, (prompt, chosen, rejected) in enumerate(pairs):
        num_prompt, num_chosen, num_rejected = len(prompt), len(chosen), len(rejected)
        first_chosen = len(ids) + num_prompt
        first_rejected = first_chosen + num_chosen
        predict += [first_chosen - 1, *range(first_chosen, first_rejected - 1)]
        predict += [first_chosen - 1, *range(first_rejected, first_rejected + num_rejected - 1)]
        ids += [*prompt, *chosen, *rejected]
        positions += [*range(num_prompt + num_chosen), *range(num_prompt, num_prompt + num_rejected)]
        pair += [p] * (num_prompt + num_chosen + num_rejected)
        branch += [PROMPT] * num_prompt + [CHOSEN] * num_chosen + [REJECTED] * num_rejected
    mask_TT = packed_mask(torch.tensor(pair), torch.tensor(branch))
    return _batch(pairs, torch.tensor([ids]), torch.tensor([positions]), mask_TT[None, None], predict)


def pack_examples(examples: Sequence[ExampleIds]) -> PairBatch:
    """All examples in one row, none of which sees another one; sequence e is the target of example e."""
    ids: list[int] = []
    positions: list[int] = []
    number: list[int] = []
    predict: list[int] = []
    for e, (prompt, target) in enumerate(examples):
        first = len(ids) + len(prompt) - 1
        predict += range(first, first + len(target))
        ids += [*prompt, *target]
        positions += range(len(prompt) + len(target))
        number += [e] * (len(prompt) + len(target))
    number_T = torch.tensor(number)
    mask_TT = packed_mask(number_T, torch.zeros_like(number_T))
    return _batch(examples, torch.tensor([ids]), torch.tensor([positions]), mask_TT[None, None], predict)


def pad_examples(examples: Sequence[ExampleIds], pad_id: int) -> PairBatch:
    """One row per example, padded on the right."""
    rows = [[*prompt, *target] for prompt, target in examples]
    firsts = [len(prompt) for prompt, _ in examples]
    return _padded(examples, rows, firsts, pad_id)


def packed_mask(pair_T: Tensor, branch_T: Tensor) -> Tensor:
    """Bool [T, T], query by key: same pair, not later in the row, and the key is prompt or of the query's branch."""
    causal_TT = torch.ones(len(pair_T), len(pair_T), dtype=torch.bool).tril()
    same_pair_TT = pair_T[:, None] == pair_T[None]
    visible_TT = (branch_T[None] == PROMPT) | (branch_T[:, None] == branch_T[None])
    return causal_TT & same_pair_TT & visible_TT


def pad_pairs(pairs: Sequence[PairIds], pad_id: int) -> PairBatch:
    """Two rows per pair, prompt + chosen and prompt + rejected, padded on the right."""
    rows = [[*prompt, *response] for prompt, *responses in pairs for response in responses]
    return _padded(pairs, rows, [len(prompt) for prompt, *_ in pairs for _ in range(2)], pad_id)


def _padded(
    items: Sequence[Sequence[Sequence[int]]], rows: list[list[int]], firsts: list[int], pad_id: int
) -> PairBatch:
    """`rows` are whole sequences, `firsts` the place of each one's first response token."""
    width = max(len(row) for row in rows)
    ids = [row + [pad_id] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    predict: list[int] = []
    for s, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        predict += range(s * width + first - 1, s * width + len(row) - 1)
    return _batch(items, torch.tensor(ids), None, torch.tensor(mask), predict)


def _batch(
    items: Sequence[Sequence[Sequence[int]]],
    input_ids: Tensor,
    position_ids: Tensor | None,
    mask: Tensor,
    predict: list[int],
) -> PairBatch:
    if not all(len(part) for item in items for part in item):
        raise ValueError("a pair needs at least one token in each of prompt, chosen and rejected; so does an example")
    responses = [response for _, *found in items for response in found]
    length_S = torch.tensor([len(response) for response in responses])
    return PairBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=mask,
        predict_R=torch.tensor(predict),
        target_R=torch.tensor([token for response in responses for token in response]),
        segment_R=torch.arange(len(responses)).repeat_interleave(length_S),
        length_S=length_S,
    )


def response_logps(model: nn.Module, batch: PairBatch, chunk: int = 512, num_chunks: int | None = None) -> Tensor:
    """Log-probabilities (natural, temperature 1) of all response tokens: float32 [R].

    The output embedding sees `chunk` positions at a time; with gradients on, every chunk's logits are computed again
    in the backward pass. `num_chunks` fixes the number of chunks instead: under ZeRO-3 each call gathers the weight
    from all ranks, so all ranks must make equally many. For the same reason modules are called and no weight is
    touched; wrap this function in the forward of the module that DeepSpeed gets, whose hooks start a new step there.
    """
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    hidden_BTH = model.base_model(**inputs, use_cache=False).last_hidden_state
    hidden_RH = hidden_BTH.flatten(0, 1)[batch.predict_R]
    head = model.get_output_embeddings()

    def chunk_logps(hidden_CH: Tensor, target_C: Tensor) -> Tensor:
        return -nn.functional.cross_entropy(head(hidden_CH).float(), target_C, reduction="none")

    pieces = -(-len(hidden_RH) // chunk) if num_chunks is None else num_chunks
    logps = []
    for hidden_CH, target_C in zip(hidden_RH.tensor_split(pieces), batch.target_R.tensor_split(pieces), strict=True):
        if torch.is_grad_enabled():
            # The head draws no random numbers, so there is no generator state worth keeping.
            logps.append(checkpoint(chunk_logps, hidden_CH, target_C, use_reentrant=False, preserve_rng_state=False))
        else:
            logps.append(chunk_logps(hidden_CH, target_C))
    return torch.cat(logps)


def check_architecture(model: nn.Module) -> None:
    """Raises ValueError for a model whose logits are not its output embedding of the last hidden state.

    Known settings are refused by name; anything else shows in a comparison with the model's own logits.
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    for setting in LOGIT_SETTINGS:
        value = getattr(config, setting, None)
        if value is not None and value != 1:
            raise ValueError(
                f"{name} has {setting}={value}, which the response-only log-probabilities leave out; "
                "train a model whose config sets it to null or 1"
            )
    if model.base_model is model or model.get_output_embeddings() is None:
        raise ValueError(f"{name} has no output embedding on top of a base model; load it as a causal language model")
    pairs, _ = _probe_pairs(model)
    batch = pad_pairs(pairs, pad_id=0).to(model.device)
    with _evaluating(model):
        ours_R = response_logps(model, batch)
        logits_BTV = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    logps_RV = logits_BTV.flatten(0, 1)[batch.predict_R].float().log_softmax(-1)
    own_R = logps_RV.gather(-1, batch.target_R[:, None]).squeeze(-1)
    if not _close(ours_R, own_R, model.dtype):
        raise ValueError(
            f"{name} does more to its logits than the output embedding: log-probabilities differ from its own by "
            f"{(ours_R - own_R).abs().max().item():.3g}; this architecture is not supported"
        )


def supports_packing(model: nn.Module) -> bool:
    """Whether `pack_pairs` gives the log-probabilities of `pad_pairs`; tried on two short random pairs.

    A given 4D mask replaces the model's own, so layers that mask more than the future are refused by their config: a
    window is longer than any short probe. Eager, flex and flash attention do not read a bool 4D mask; use sdpa.
    """
    if _masks_more_than_future(model.config.get_text_config()):
        return False
    pairs, others = _probe_pairs(model)
    with _evaluating(model):
        padded_R = response_logps(model, pad_pairs(pairs, pad_id=0).to(model.device))
        others_R = response_logps(model, pad_pairs(others, pad_id=0).to(model.device))
        try:
            packed_R = response_logps(model, pack_pairs(pairs).to(model.device))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # each architecture that has no use for a 4D mask or for position_ids fails in its own way
            return False
    # Where the context hardly matters (small or untrained models, low precision) a wrong mask would pass as rounding.
    context = (padded_R - others_R).abs().max()
    return _close(packed_R, padded_R, model.dtype) and bool((packed_R - padded_R).abs().max() < 0.1 * context)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _masks_more_than_future(config: object) -> bool:
    layers = [*(getattr(config, "layer_types", None) or ()), *(getattr(config, "attention_layers", None) or ())]
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return any(kind not in ("full_attention", "global") for kind in layers) or any(windows)


def _probe_pairs(model: nn.Module) -> tuple[list[PairIds], list[PairIds]]:
    """Two random pairs of unequal lengths, and the same responses behind other prompts of the same lengths."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size

    def tokens(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    pairs: list[PairIds] = [(tokens(7), tokens(9), tokens(4)), (tokens(5), tokens(3), tokens(8))]
    return pairs, [(tokens(len(prompt)), chosen, rejected) for prompt, chosen, rejected in pairs]


def _close(a_R: Tensor, b_R: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to rounding: within 1e-4 of the largest value, or within 8 machine epsilons of it if that is more."""
    tolerance = max(1e-4, 8 * torch.finfo(dtype).eps)
    return bool((a_R - b_R).abs().max() <= tolerance * b_R.abs().max())
