"""Preference losses as sums over pairs, and what they report.

Shapes in names: P pairs, S = 2P sequences (2p chosen, 2p+1 rejected), R response tokens of all sequences.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rsrlm.losses.base import Loss, Sums, sequence_sums
from rsrlm.losses.packing import TokenBatch
from rsrlm.records import PreferencePair
from rsrlm.settings.train import DPO, TrainRule


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What comes with P pairs: the weight of each, the probability that its chosen is the better one, and the scores of
    both, [S]."""

    weight_P: Tensor
    target_P: Tensor
    score_S: Tensor


def labels_of(pairs: Sequence[PreferencePair], like: Tensor) -> Labels:
    """As tensors of the dtype and on the device of `like`."""
    return Labels(
        weight_P=like.new_tensor([pair.weight for pair in pairs]),
        target_P=like.new_tensor([pair.target for pair in pairs]),
        score_S=like.new_tensor([score for pair in pairs for score in (pair.chosen_score, pair.rejected_score)]),
    )


class PairLoss(Loss):
    """`train.loss` of each pair times its weight, summed; the denominator is the number of pairs of the step."""

    item = PreferencePair
    prompt = "prompt_token_ids"
    responses = ("chosen_token_ids", "rejected_token_ids")
    needs_reference = True
    train: DPO

    def __init__(self, train: TrainRule) -> None:
        if not isinstance(train, DPO):
            raise TypeError(f"preference pairs are trained on by the rules of DPO, not by {type(train).__name__}")
        self.train = train

    def sums(
        self,
        logps_R: Tensor,
        ref_logps_R: Tensor | None,
        batch: TokenBatch,
        items: Sequence[PreferencePair],
        counted_N: Tensor,
    ) -> Sums:
        assert ref_logps_R is not None
        return pair_loss(logps_R, ref_logps_R, batch, counted_N, labels_of(items, logps_R), self.train)

    def denominator(self, items: int, response_tokens: int) -> int:
        return items

    def means(self, summed: dict[str, float]) -> dict[str, float]:
        return pair_means(summed)


def pair_loss(
    logps_R: Tensor,
    ref_logps_R: Tensor,
    batch: TokenBatch,
    counted_P: Tensor,
    labels: Labels,
    train: DPO,
) -> Sums:
    """Loss of P pairs from policy and reference log-probabilities of their response tokens.

    With h = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)), each summed over the
    response's tokens, the loss of a pair is its weight times (`preference_loss` + `train.nll_scale` times `nll`, as in
    iterative RPO, 2404.19733). The weight multiplies nothing else (ScPO, 2411.04109). `counted_P` is 1 for a pair, 0
    for a dummy.

    sums, over the pairs that count; `each` has the same by pair, [P], apart from kl and kl_tokens:
      loss: as above; dpo_loss: its part without nll, weighted likewise.
      pairs: number of pairs, the denominator of all others but kl.
      accuracy: pairs whose margin is above 0. Before the first update all are ties, which count 0 (exactly so only if
        policy and reference were computed on the same batch; else rounding decides).
      margin: reward margin, beta h.
      chosen_logp, rejected_logp: the policy's log-probability of the whole response, in nats.
      nll: the policy's negative log-likelihood of the chosen, in nats per token.
      kl, kl_tokens: see `drift`.
    """
    # One dtype for all sums, so that they can be reduced as one tensor.
    counted_P = counted_P.to(logps_R.dtype)
    logp_S, ref_S = (sequence_sums(one, batch.segment_R, len(batch.length_S)) for one in (logps_R, ref_logps_R))
    ratio_S = logp_S - ref_S
    h_P = ratio_S[0::2] - ratio_S[1::2]
    nll_P = -logp_S[0::2] / batch.length_S[0::2]
    preference_P = preference_loss(ratio_S, labels, train)
    loss_P = counted_P * labels.weight_P * (preference_P + train.nll_scale * nll_P)
    with torch.no_grad():
        each = {
            "loss": loss_P.detach(),
            "dpo_loss": counted_P * labels.weight_P * preference_P,
            "pairs": counted_P,
            "accuracy": counted_P * (h_P > 0),
            "margin": counted_P * train.beta * h_P,
            "chosen_logp": counted_P * logp_S[0::2],
            "rejected_logp": counted_P * logp_S[1::2],
            "nll": counted_P * nll_P,
        }
        sums = {name: values_P.sum() for name, values_P in each.items()}
        sums |= drift(logps_R, ref_logps_R, counted_P.repeat_interleave(2)[batch.segment_R])
    return Sums(loss=loss_P.sum(), sums=sums, each=each)


def preference_loss(ratio_S: Tensor, labels: Labels, train: DPO) -> Tensor:
    """[P]: loss of each pair by the log-ratios of its responses, whose difference is h, and of which the chosen is the
    better one with probability t:

      sigmoid: -t log sigmoid(beta h) - (1 - t) log sigmoid(-beta h) (DPO, 2305.18290 eq. 7, as in self-rewarding
        sec. 2.4, for t = 1; CREAM, 2410.12735, for others)
      ipo: t (h - 1 / (2 beta))^2 + (1 - t) (h + 1 / (2 beta))^2 (2310.12036 eq. 17)
      sppo: half the sum of (ratio - (score - 1/2) / beta)^2 over both, scores being win rates (SPPO, 2405.00675)
    """
    target_P = labels.target_P
    h_P = ratio_S[0::2] - ratio_S[1::2]
    match train.loss:
        case "sigmoid":
            return -target_P * logsigmoid(train.beta * h_P) - (1 - target_P) * logsigmoid(-train.beta * h_P)
        case "ipo":
            goal = 1 / (2 * train.beta)
            return target_P * (h_P - goal) ** 2 + (1 - target_P) * (-h_P - goal) ** 2
        case "sppo":
            off_S = ratio_S - (labels.score_S - 0.5) / train.beta
            return (off_S[0::2] ** 2 + off_S[1::2] ** 2) / 2
    raise ValueError(f"no loss {train.loss!r}")


def drift(logps_R: Tensor, ref_logps_R: Tensor, counted_R: Tensor) -> dict[str, Tensor]:
    """Estimate of KL(reference || policy) over the tokens of both responses, `kl` in nats over `kl_tokens`.

    kl adds exp(r) - 1 - r, r = log pi - log ref of that token (the k3 estimator; each term is >= 0). Its expectation is
    the KL(reference || policy) of the next token if the tokens were sampled from the reference itself. Here they are
    biased: sampled at another temperature or with top-p, and only the best and worst of several responses.
    Read it as a measure of drift.
    """
    log_ratio_R = logps_R - ref_logps_R
    kl_R = torch.expm1(log_ratio_R) - log_ratio_R
    return {"kl": (counted_R * kl_R).sum(), "kl_tokens": counted_R.sum()}


def pair_means(summed: dict[str, float]) -> dict[str, float]:
    """Means over the pairs of a step, and over those of each kind; `pairs` are numbers of pairs."""
    by_kind: dict[str, dict[str, float]] = {}
    for name, value in summed.items():
        kind, slash, plain = name.rpartition("/")
        by_kind.setdefault(kind + slash, {})[plain] = value
    found: dict[str, float] = {}
    for prefix, sums in by_kind.items():
        pairs, kl, kl_tokens = sums.pop("pairs"), sums.pop("kl", None), sums.pop("kl_tokens", None)
        found |= {prefix + name: value / pairs for name, value in sums.items()} | {prefix + "pairs": pairs}
        if kl is not None:
            found["kl_per_token"] = kl / kl_tokens if kl_tokens else math.nan
    return found
