"""Preference losses as sums over pairs, what they report, and the learning rate.

Shapes in names: P pairs, S = 2P sequences (2p chosen, 2p+1 rejected), R response tokens of all sequences.

Nothing here averages over pairs: micro-batches and ranks hold unequal numbers of them, so the learner adds the sums up
and divides once by the number of pairs of the whole step.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rsrlm.losses.packing import PairBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLoss:
    """`loss` is a scalar with gradient, the sum over pairs; `sums` are detached scalars, all in the same fixed order.

    sums, each weighted by `weight_P`:
      loss: as above.
      pairs: number of pairs, the denominator of all others but kl.
      accuracy: pairs whose reward margin is above 0. A tie counts 0, and before the first update all pairs are ties
        (exactly so only if policy and reference were computed on the same batch; else rounding decides).
      margin: reward margin, beta * (log-ratio of chosen - log-ratio of rejected).
      chosen_logp, rejected_logp: the policy's log-probability of the whole response, in nats.
      nll: the policy's negative log-likelihood of the chosen, in nats per token.
      kl: estimate of KL(reference || policy), in nats; see `pair_loss`.
      kl_tokens: response tokens of both responses, the denominator of kl.
    `each` has the same for every pair, [P], apart from kl and kl_tokens.
    """

    loss: Tensor
    sums: dict[str, Tensor]
    each: dict[str, Tensor]


def pair_loss(
    logps_R: Tensor,
    ref_logps_R: Tensor,
    batch: PairBatch,
    weight_P: Tensor,
    *,
    pair_weight_P: Tensor | None = None,
    target_P: Tensor | None = None,
    beta: float,
    loss: str = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    nll_scale: float = 0.0,
) -> PairLoss:
    """Loss of P pairs from policy and reference log-probabilities of their response tokens.

    With h = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)), each summed over the
    response's tokens, or averaged over them with `length_normalized`:
      sigmoid: -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h), eps = `label_smoothing` (DPO, 2305.18290
        eq. 7, as in self-rewarding sec. 2.4; conservative DPO for eps > 0)
      ipo: (h - 1 / (2 beta))^2 (2310.12036 eq. 17; takes no smoothing)
    plus `nll_scale` times the negative log-likelihood of the chosen per token of it (iterative RPO, 2404.19733).

    `target_P` is the probability that the chosen is the better one: with t below 1 the loss of the pair is t times
    that of its label and 1 - t times that of the label reversed (CREAM, 2410.12735). `pair_weight_P` multiplies the
    loss of a pair and nothing else that it adds (ScPO, 2411.04109); the loss is still divided by the number of pairs.

    `weight_P` multiplies all that a pair adds: 1 for a pair, 0 for a dummy that keeps ranks in step.

    sums["kl"] adds exp(r) - 1 - r over the tokens of both responses, r = log pi - log ref of that token (the k3
    estimator; each term is >= 0). Its expectation is the KL(reference || policy) of the next token if the tokens were
    sampled from the reference itself. Here they are biased: sampled at another temperature or with top-p or top-k, and
    only the best and worst of several responses. Read it as a measure of drift.
    """
    weight_P = weight_P.to(logps_R.dtype)  # so that all sums have one dtype and can be reduced as one tensor
    logp_S = sequence_sums(logps_R, batch.segment_R, 2 * batch.num_pairs)
    ref_logp_S = sequence_sums(ref_logps_R, batch.segment_R, 2 * batch.num_pairs)
    ratio_S = logp_S - ref_logp_S
    if length_normalized:
        ratio_S = ratio_S / batch.length_S
    h_P = ratio_S[0::2] - ratio_S[1::2]
    ones_P = torch.ones_like(h_P)
    target_P = ones_P if target_P is None else target_P.to(h_P.dtype)
    reversed_P = target_P * label_smoothing + (1 - target_P) * (1 - label_smoothing)
    straight_P = target_P * (1 - label_smoothing) + (1 - target_P) * label_smoothing
    if loss == "sigmoid":
        loss_P = -straight_P * logsigmoid(beta * h_P) - reversed_P * logsigmoid(-beta * h_P)
    elif loss == "ipo" and not label_smoothing:
        loss_P = straight_P * (h_P - 1 / (2 * beta)) ** 2 + reversed_P * (h_P + 1 / (2 * beta)) ** 2
    else:
        raise ValueError(f"no loss {loss!r} with label_smoothing={label_smoothing}")
    nll_P = -logp_S[0::2] / batch.length_S[0::2]
    scale_P = ones_P if pair_weight_P is None else pair_weight_P.to(h_P.dtype)
    whole_P = weight_P * scale_P * (loss_P + nll_scale * nll_P)
    total = whole_P.sum()

    with torch.no_grad():
        weight_R = weight_P.repeat_interleave(2)[batch.segment_R]
        log_ratio_R = logps_R - ref_logps_R
        kl_R = torch.expm1(log_ratio_R) - log_ratio_R
        each = {
            "loss": whole_P,
            "pairs": weight_P,
            "accuracy": weight_P * (h_P > 0),
            "margin": weight_P * beta * h_P,
            "chosen_logp": weight_P * logp_S[0::2],
            "rejected_logp": weight_P * logp_S[1::2],
            "nll": weight_P * nll_P,
        }
        sums = {
            **{name: values_P.sum() for name, values_P in each.items()},
            "kl": (weight_R * kl_R).sum(),
            "kl_tokens": weight_R.sum(),
        }
    return PairLoss(loss=total, sums=sums, each=each)


def target_loss(logps_R: Tensor, segment_R: Tensor, weight_E: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Supervised fine-tuning: the negative log-likelihood of all target tokens, summed, in nats; and its sums.

    Shapes: R target tokens of E examples, `segment_R` the example of each. `weight_E` is 1 for an example and 0 for a
    dummy that keeps ranks in step. The denominator, "tokens_trained", is the number of target tokens of the step.
    """
    weight_R = weight_E.to(logps_R.dtype)[segment_R]
    loss = -(weight_R * logps_R).sum()
    return loss, {"loss": loss.detach(), "tokens_trained": weight_R.sum(), "examples": weight_E.to(logps_R.dtype).sum()}


def sequence_sums(values_R: Tensor, segment_R: Tensor, num_segments: int) -> Tensor:
    """[num_segments]: the sum of the values of each segment; 0 for a segment without any."""
    return values_R.new_zeros(num_segments).index_add(0, segment_R, values_R)


def lr_at(step: int, total_steps: int, *, lr: float, lr_final: float, warmup_steps: int, schedule: str) -> float:
    """Learning rate of optimizer step `step`, counted from 0 (self-rewarding sec. 3.1.3: 1e-6 to 1e-7).

    Warm-up: steps 0..warmup_steps-1 take lr * (step + 1) / (warmup_steps + 1), so no step is lost at 0 and step
    `warmup_steps` has `lr`. From there cosine and linear fall to `lr_final` at the last step, total_steps - 1, and stay
    there; constant stays at `lr`. A run that ends in its warm-up never falls.
    """
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return lr
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    if schedule == "cosine":
        fallen = (1 - math.cos(math.pi * progress)) / 2
    elif schedule == "linear":
        fallen = progress
    else:
        raise ValueError(f"no schedule {schedule!r}")
    return (1 - fallen) * lr + fallen * lr_final
