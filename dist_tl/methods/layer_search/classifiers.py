"""Small classifiers on Gram matrices, with exact leave-one-out scores.

All are batched over candidate sets. Higher item scores are better: log-probabilities in nats for
ncm and logistic, the negative squared error of the one-hot prediction for ridge.

After Lee et al., arXiv:2111.10937; section "Classifiers" and "Score J" of the notes. Leave-one-out
of ridge is the textbook identity r_i / (1 - H_ii).

Shape suffixes: I = candidate sets, S = support items, Q = queries, C = classes.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_tl.config import StrictModel
from dist_tl.errors import NotConvergedError

GRADIENT_NORM = 1e-6
MAX_ITERATIONS = 500


class ClassifierConfig(StrictModel):
    """The classifier on the selected layers."""

    kind: Literal["ridge", "ncm", "logistic"] = Field(
        default="ridge",
        description="ridge: least squares on one-hot labels; ncm: nearest class mean; logistic: "
        "multinomial logistic regression (slow).",
    )
    penalty: float = Field(
        default=0.1, gt=0, description="Penalty rho of ridge; L2 strength of logistic."
    )
    sharpness: float = Field(
        default=10.0, gt=0, description="alpha of ncm; scores are -alpha distance^2."
    )


def loo_scores(gram_ISS: Tensor, y_SC: Tensor, config: ClassifierConfig) -> Tensor:
    """Returns the score of each support item under a classifier fitted on all others, (I, S).

    The only item of a class has no score: NaN.

    Args:
        gram_ISS: Gram matrices of the candidate sets, float64.
        y_SC: one-hot labels.

    Raises:
        NotConvergedError: logistic regression did not converge.
    """
    scores_IS = _LOO[config.kind](gram_ISS, y_SC, config)
    alone_S = y_SC @ y_SC.sum(dim=0) == 1
    return scores_IS.masked_fill(alone_S, math.nan)


def ridge_head(phi_SD: Tensor, y_SC: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Returns the ridge classifier as a linear layer, (C, D) and (C,), float64, D = features.

    Args:
        phi_SD: features of the support for one set of layers.
    """
    mean_D, mean_C = phi_SD.mean(dim=0), y_SC.mean(dim=0)
    centred_SD = phi_SD - mean_D
    gram_SS = centred_SD @ centred_SD.T + penalty * torch.eye(len(phi_SD), dtype=phi_SD.dtype)
    weight_CD = (centred_SD.T @ torch.linalg.solve(gram_SS, y_SC - mean_C)).T
    return weight_CD, mean_C - weight_CD @ mean_D


def shuffled_loo_means(gram_ISS: Tensor, y_PSC: Tensor, config: ClassifierConfig) -> Tensor:
    """Returns mean leave-one-out scores under many labellings of the same items, (P, I).

    Suffix P = labellings. The matrix of ridge does not depend on the labels and is computed once.
    """
    if config.kind != "ridge":
        return torch.stack([loo_scores(gram_ISS, y_SC, config).nanmean(dim=1) for y_SC in y_PSC])
    hat_ISS = _hat(gram_ISS, config.penalty)
    left_IS1 = (1 - hat_ISS.diagonal(dim1=1, dim2=2))[:, :, None]
    alone_PS = torch.einsum("psc,pc->ps", y_PSC, y_PSC.sum(dim=1)) == 1
    means = []
    for y_SC, alone_S in zip(y_PSC, alone_PS, strict=True):
        scores_IS = -((y_SC - hat_ISS @ y_SC) / left_IS1).square().sum(dim=2)
        means.append(scores_IS[:, ~alone_S].mean(dim=1))
    return torch.stack(means)


def query_item_scores(
    support_ISS: Tensor,
    cross_IQS: Tensor,
    y_SC: Tensor,
    y_QC: Tensor,
    config: ClassifierConfig,
) -> Tensor:
    """Returns the scores of labelled queries, (I, Q), on the scale of :func:`loo_scores`."""
    scores_IQC = query_scores(support_ISS, cross_IQS, y_SC, config)
    if config.kind == "ridge":
        return -(y_QC - scores_IQC).square().sum(dim=2)
    return (scores_IQC.log_softmax(dim=2) * y_QC).sum(dim=2)


def query_scores(
    support_ISS: Tensor, cross_IQS: Tensor, y_SC: Tensor, config: ClassifierConfig
) -> Tensor:
    """Returns class scores of queries, (I, Q, C); the largest is the prediction.

    Args:
        support_ISS: Gram matrices of the support.
        cross_IQS: inner products of queries with support items.
    """
    return _QUERY[config.kind](support_ISS, cross_IQS, y_SC, config)


def _ridge_loo(gram_ISS: Tensor, y_SC: Tensor, config: ClassifierConfig) -> Tensor:
    hat_ISS = _hat(gram_ISS, config.penalty)
    residual_ISC = y_SC - hat_ISS @ y_SC
    left_IS = 1 - hat_ISS.diagonal(dim1=1, dim2=2)
    return -(residual_ISC / left_IS[:, :, None]).square().sum(dim=2)


def _hat(gram_ISS: Tensor, penalty: float) -> Tensor:
    """Returns the matrix that maps labels to fitted labels: their mean plus centred ridge."""
    size = gram_ISS.shape[1]
    centred_ISS = _centred(gram_ISS)
    shifted_ISS = centred_ISS + penalty * torch.eye(size, dtype=gram_ISS.dtype)
    return torch.linalg.solve(shifted_ISS, centred_ISS).mT + 1 / size


def _centred(gram_ISS: Tensor) -> Tensor:
    rows_IS1 = gram_ISS.mean(dim=2, keepdim=True)
    return gram_ISS - rows_IS1 - rows_IS1.mT + rows_IS1.mean(dim=1, keepdim=True)


def _ridge_query(
    support_ISS: Tensor, cross_IQS: Tensor, y_SC: Tensor, config: ClassifierConfig
) -> Tensor:
    size = support_ISS.shape[1]
    mean_C = y_SC.mean(dim=0)
    shifted_ISS = _centred(support_ISS) + config.penalty * torch.eye(size, dtype=y_SC.dtype)
    weights_ISC = torch.linalg.solve(shifted_ISS, (y_SC - mean_C).expand(len(support_ISS), -1, -1))
    k_IQS = cross_IQS - support_ISS.mean(dim=1, keepdim=True)
    k_IQS = k_IQS - k_IQS.mean(dim=2, keepdim=True)
    return mean_C + k_IQS @ weights_ISC


def _ncm_loo(gram_ISS: Tensor, y_SC: Tensor, config: ClassifierConfig) -> Tensor:
    count_C = y_SC.sum(dim=0)
    distance_ISC = _squared_distances(gram_ISS, gram_ISS, y_SC)
    # Leaving item i out multiplies its distance to its class mean by n / (n - 1).
    others_C = (count_C - 1).clamp_min(1)
    factor_SC = torch.where(y_SC > 0, (count_C / others_C).square(), 1.0)
    logits_ISC = -config.sharpness * distance_ISC * factor_SC
    return (logits_ISC.log_softmax(dim=2) * y_SC).sum(dim=2)


def _ncm_query(
    support_ISS: Tensor, cross_IQS: Tensor, y_SC: Tensor, config: ClassifierConfig
) -> Tensor:
    # The queries' own norms are equal for all classes and do not affect the order.
    count_C = y_SC.sum(dim=0)
    within_IC = torch.einsum("sc,ist,tc->ic", y_SC, support_ISS, y_SC) / count_C.square()
    return -config.sharpness * (within_IC[:, None] - 2 * (cross_IQS @ y_SC) / count_C)


def _squared_distances(gram_ISS: Tensor, cross_IQS: Tensor, y_SC: Tensor) -> Tensor:
    """Returns squared distances of support items to class means, (I, S, C)."""
    count_C = y_SC.sum(dim=0)
    own_IS = gram_ISS.diagonal(dim1=1, dim2=2)
    within_IC = torch.einsum("sc,ist,tc->ic", y_SC, gram_ISS, y_SC) / count_C.square()
    return own_IS[:, :, None] - 2 * (cross_IQS @ y_SC) / count_C + within_IC[:, None]


def _logistic_loo(gram_ISS: Tensor, y_SC: Tensor, config: ClassifierConfig) -> Tensor:
    rows = []
    size = len(y_SC)
    for gram_SS in gram_ISS:
        start, scores = None, []
        for item in range(size):
            others = [i for i in range(size) if i != item]
            fit = _fit_logistic(gram_SS[others][:, others], y_SC[others], config.penalty, start)
            logits_C = gram_SS[item, others] @ fit[0] + fit[1]
            scores.append((logits_C.log_softmax(dim=0) * y_SC[item]).sum())
            start = fit
        rows.append(torch.stack(scores))
    return torch.stack(rows)


def _logistic_query(
    support_ISS: Tensor, cross_IQS: Tensor, y_SC: Tensor, config: ClassifierConfig
) -> Tensor:
    fits = [_fit_logistic(gram_SS, y_SC, config.penalty, None) for gram_SS in support_ISS]
    return torch.stack(
        [cross_QS @ fit[0] + fit[1] for cross_QS, fit in zip(cross_IQS, fits, strict=True)]
    )


def _fit_logistic(
    gram_SS: Tensor, y_SC: Tensor, penalty: float, start: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Returns dual weights (S, C) and intercepts (C,), minimising sum CE + (penalty / 2) |w|^2."""
    dual_SC = torch.zeros_like(y_SC) if start is None else start[0].clone()
    offset_C = torch.zeros(y_SC.shape[1], dtype=y_SC.dtype) if start is None else start[1].clone()
    dual_SC.requires_grad_()
    offset_C.requires_grad_()
    solver = torch.optim.LBFGS(
        [dual_SC, offset_C],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=GRADIENT_NORM / 10,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        logits_SC = gram_SS @ dual_SC + offset_C
        fit = -(logits_SC.log_softmax(dim=1) * y_SC).sum()
        loss = fit + 0.5 * penalty * (dual_SC * (gram_SS @ dual_SC)).sum()
        loss.backward()
        return loss

    solver.step(closure)
    closure()
    assert dual_SC.grad is not None
    assert offset_C.grad is not None
    norm = float(torch.cat([dual_SC.grad.flatten(), offset_C.grad]).norm())
    if not norm < GRADIENT_NORM:
        raise NotConvergedError(
            f"logistic regression on {len(y_SC)} items: gradient norm {norm:.2g}, expected "
            f"below {GRADIENT_NORM:g}; increase classifier.penalty or use ridge"
        )
    return dual_SC.detach(), offset_C.detach()


_LOO = {"ridge": _ridge_loo, "ncm": _ncm_loo, "logistic": _logistic_loo}
_QUERY = {"ridge": _ridge_query, "ncm": _ncm_query, "logistic": _logistic_query}
