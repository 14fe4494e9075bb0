"""Token ids as model input, and the log-probabilities of the response tokens.

An item is a prompt and the responses that continue it: two for a preference pair, one for an example to imitate.
Shapes in names: B rows, T tokens of a row, S sequences (all responses of all items, in order), R response tokens of all
sequences in that order, C of them in one chunk, H hidden size, V vocabulary.

Packing puts several items in a row and every prompt there once (prefix sharing, arXiv 2410.20305). Only the predicting
positions go through the output embedding, in checkpointed chunks, so logits of the size [B, T, V] never exist.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ItemIds = Sequence[Sequence[int]]  # token ids of a prompt, then of each response to it

ROW_TOKENS = 2048  # about: longer rows of several items cost more in attention than they spare in padding
PROMPT = 0  # the branch of a prompt; those of its responses are 1, 2, ...

# What the heads of some models do to their logits (Gemma, Granite, Cohere, Falcon-H1); None and 1 do nothing.
LOGIT_SETTINGS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """The items of one micro-batch, packed or padded. What ends in R or S is the same in both forms.

    input_ids: [B, T] token ids; B is S padded.
    position_ids: [B, T] packed; None padded, where the model's own positions are right.
    owner_2BT: [2, B, T] packed: the item of each token (-1: padding), and its branch there; None padded.
    padding_BT: int64 [B, T] padded (0: padding); None packed.
    predict_R: index into the hidden states, flattened to [B * T, H], that predicts each response token.
    target_R: id of each response token.
    segment_R: the sequence that each response token belongs to, 0..S-1, ascending.
    length_S: response tokens of each sequence.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    owner_2BT: Tensor | None
    padding_BT: Tensor | None
    predict_R: Tensor
    target_R: Tensor
    segment_R: Tensor
    length_S: Tensor

    def to(self, device: torch.device | str) -> "TokenBatch":
        own = ((field.name, getattr(self, field.name)) for field in fields(self))
        return replace(self, **{name: value.to(device) for name, value in own if value is not None})

    @property
    def tokens(self) -> Tensor:
        """Number of those that are no padding."""
        if self.owner_2BT is not None:
            return (self.owner_2BT[0] >= 0).sum()
        assert self.padding_BT is not None
        return self.padding_BT.sum()

    @property
    def attention_mask(self) -> Tensor:
        """Bool [B, 1, T, T] packed (True: the query, third, sees the key, last); int64 [B, T] padded.

        Made where the batch is: of 8,000 tokens it has 64 million entries, which a GPU fills in a moment.
        """
        if self.owner_2BT is not None:
            return packed_mask(*self.owner_2BT)[:, None]
        assert self.padding_BT is not None
        return self.padding_BT


def pack(items: Sequence[ItemIds], row_tokens: int = ROW_TOKENS) -> TokenBatch:
    """Items in rows of about `row_tokens`, each as prompt and responses, every response starting at position
    len(prompt).

    The last token of a prompt predicts the first token of each of its responses.
    """
    lengths = [sum(map(len, parts)) for parts in items]
    rows = in_rows(lengths, row_tokens)
    width = max(sum(lengths[number] for number in row) for row in rows)
    ids, positions, branches = ([0] * (len(rows) * width) for _ in range(3))
    owners = [-1] * len(ids)  # padding sees itself, and nobody sees it
    starts = [0] * len(items)
    for at, row in enumerate(rows):
        for place, number in enumerate(row):
            starts[number] = at * width + sum(lengths[one] for one in row[:place])
    predict: list[int] = []
    for number, (prompt, *responses) in enumerate(items):
        first = starts[number]
        last = first + len(prompt) - 1  # of the prompt
        for branch, tokens in enumerate((prompt, *responses)):
            end = first + len(tokens)
            if branch != PROMPT:
                predict += [last, *range(first, end - 1)]
            begin = 0 if branch == PROMPT else len(prompt)
            ids[first:end] = tokens
            positions[first:end] = range(begin, begin + len(tokens))
            owners[first:end], branches[first:end] = [number] * len(tokens), [branch] * len(tokens)
            first = end
    shaped = (torch.tensor(values).view(len(rows), width) for values in (ids, positions, owners, branches))
    input_ids, position_ids, *owner = shaped
    return _batch(items, input_ids, position_ids, predict, owner_2BT=torch.stack(owner))


def in_rows(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Numbers of the items of each row: the longest first, each into the shortest row. There are as many rows as make
    them about `row_tokens` long, or as long as the longest item."""
    rows: list[list[int]] = [[] for _ in range(max(1, round(sum(lengths) / max(row_tokens, *lengths))))]
    filled = [0] * len(rows)
    for number in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        at = filled.index(min(filled))
        rows[at].append(number)
        filled[at] += lengths[number]
    return [sorted(row) for row in rows]


def packed_mask(item_BT: Tensor, branch_BT: Tensor) -> Tensor:
    """Bool [B, T, T], query by key: same item, not later in the row, and the key is prompt or of the query's branch."""
    length = item_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=item_BT.device).tril()
    same_item_BTT = item_BT[:, :, None] == item_BT[:, None]
    visible_BTT = (branch_BT[:, None] == PROMPT) | (branch_BT[:, :, None] == branch_BT[:, None])
    return causal_TT & same_item_BTT & visible_BTT


def pad(items: Sequence[ItemIds], pad_id: int) -> TokenBatch:
    """One row for each response, its prompt before it, padded on the right."""
    rows = [([*prompt, *response], len(prompt)) for prompt, *responses in items for response in responses]
    width = max(len(row) for row, _ in rows)
    ids = [row + [pad_id] * (width - len(row)) for row, _ in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row, _ in rows]
    predict: list[int] = []
    for s, (row, first) in enumerate(rows):
        predict += range(s * width + first - 1, s * width + len(row) - 1)
    return _batch(items, torch.tensor(ids), None, predict, padding_BT=torch.tensor(mask))


def _batch(
    items: Sequence[ItemIds],
    input_ids: Tensor,
    position_ids: Tensor | None,
    predict: list[int],
    owner_2BT: Tensor | None = None,
    padding_BT: Tensor | None = None,
) -> TokenBatch:
    if not all(len(part) for item in items for part in item):
        raise ValueError("a prompt and each response to it need at least one token")
    responses = [response for _, *found in items for response in found]
    length_S = torch.tensor([len(response) for response in responses])
    return TokenBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        owner_2BT=owner_2BT,
        padding_BT=padding_BT,
        predict_R=torch.tensor(predict),
        target_R=torch.tensor([token for response in responses for token in response]),
        segment_R=torch.arange(len(responses)).repeat_interleave(length_S),
        length_S=length_S,
    )


def response_logps(model: nn.Module, batch: TokenBatch, chunk: int = 512, num_chunks: int | None = None) -> Tensor:
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
    batch = pad(pairs, pad_id=0).to(model.device)
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
    """Whether `pack` gives the log-probabilities of `pad`; tried on short random pairs.

    A given 4D mask replaces the model's own, so layers that mask more than the future are refused by their config: a
    window is longer than any short probe. Eager, flex and flash attention do not read a bool 4D mask; use sdpa.
    """
    if _masks_more_than_future(model.config.get_text_config()):
        return False
    pairs, others = _probe_pairs(model)
    with _evaluating(model):
        padded_R = response_logps(model, pad(pairs, pad_id=0).to(model.device))
        others_R = response_logps(model, pad(others, pad_id=0).to(model.device))
        try:
            packed_R = response_logps(model, pack(pairs, row_tokens=20).to(model.device))
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


def _probe_pairs(model: nn.Module) -> tuple[list[ItemIds], list[ItemIds]]:
    """Random pairs, of which the last two share a row, and the same responses to other prompts of the same lengths."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size

    def tokens(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    pairs: list[ItemIds] = [
        (tokens(7), tokens(9), tokens(4)),
        (tokens(5), tokens(3), tokens(8)),
        (tokens(2), tokens(1), tokens(1)),
    ]
    return pairs, [(tokens(len(prompt)), *responses) for prompt, *responses in pairs]


def _close(a_R: Tensor, b_R: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to rounding: within 1e-4 of the largest value, or within 8 machine epsilons of it if that is more."""
    tolerance = max(1e-4, 8 * torch.finfo(dtype).eps)
    return bool((a_R - b_R).abs().max() <= tolerance * b_R.abs().max())
