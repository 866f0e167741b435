"""Parameters, multiply-adds and memory of every expert and hub, counted before training."""

from dist_tl.config import StrictModel
from dist_tl.jobs.hub.stages import HubStages
from dist_tl.methods.hub.cost import multiply_adds, routed_multiply_adds
from dist_tl.models.networks import parameter_count
from dist_tl.report.results import Table


class HubRow(StrictModel):
    """An expert, the router, or a hub as a whole."""

    part: str
    parameters: int
    multiply_adds: float = 0.0
    serving_bytes: int
    training_bytes: int


def hub_rows(plan: HubStages) -> tuple[HubRow, ...]:
    """Experts, router, then every arm that routes; multiply-adds are of one image.

    A worker holds weights and gradients whole (stages 0 and 1), and its share of master weights
    and Adam's two moments; float32.

    Raises:
        ConfigError: an expert is missing, or does not take the target's images.
    """
    shape, job = plan.target.image_shape, plan.job
    experts, router = plan.experts, plan.router()
    costs = [multiply_adds(network, shape) for network in experts.values()]
    sizes = {name: parameter_count(network) for name, network in experts.items()}
    rows = [
        _row(plan, name, sizes[name], float(cost))
        for name, cost in zip(experts, costs, strict=True)
    ]
    router_cost = multiply_adds(router, shape)
    rows.append(_row(plan, "router", parameter_count(router), float(router_cost)))
    router_sizes = {"input": parameter_count(router), "static": 2 * len(costs), "random": 0}
    for arm in job.arms:
        if arm.route == "pathway":
            by_input = arm.routes.by == "input"
            even = [arm.routes.k / len(costs)] * len(costs)
            classes = plan.target.num_classes
            cost = routed_multiply_adds(router_cost * by_input, costs, even, classes)
            size = sum(sizes.values()) + router_sizes[arm.routes.by]
            size += (len(costs) * classes + 1) * classes
            rows.append(_row(plan, f"{arm.name} (k = {arm.routes.k})", size, cost))
    return tuple(rows)


def cost_table(plan: HubStages) -> Table:
    """The rows of :func:`hub_rows` as text."""
    rows = (
        (
            row.part,
            f"{row.parameters:,}",
            f"{row.multiply_adds / 1e6:,.3f}",
            f"{row.serving_bytes / 1e6:,.1f}",
            f"{row.training_bytes / 1e6:,.1f}",
        )
        for row in hub_rows(plan)
    )
    header = ("part", "parameters", "million multiply-adds an image", "MB to serve")
    return Table(title="Hub (counted)", header=(*header, "MB to train, a worker"), rows=tuple(rows))


def _row(plan: HubStages, part: str, parameters: int, cost: float) -> HubRow:
    stage, workers = plan.job.engine.zero_stage, plan.job.trainers.workers
    shared = 3 if stage >= 1 else 0  # master weights and two moments
    whole = 2 if stage <= 1 else (1 if stage == 2 else 0)
    spread = shared + (2 - whole)
    whole += 0 if stage >= 1 else 2
    return HubRow(
        part=part,
        parameters=parameters,
        multiply_adds=cost,
        serving_bytes=4 * parameters,
        training_bytes=round(4 * parameters * (whole + spread / workers)),
    )
