"""Number and size of the pods of a job."""

from types import SimpleNamespace

import pytest

from dist_tl.deploy.groups import worker_groups
from dist_tl.errors import ConfigError


def by_name(groups):
    return {group.name: group for group in groups}


def test_trainers_are_fixed_and_generators_autoscale(job_of, options):
    job = job_of("digits", "trainers.workers=4", "session.num_cpus=8", "generators.max=6")
    groups = by_name(worker_groups(job, options()))
    assert (groups["trainers"].min_pods, groups["trainers"].max_pods) == (4, 4)
    assert (groups["generators"].min_pods, groups["generators"].max_pods) == (1, 6)


def test_trainer_pods_have_room_for_a_trial(job_of, options):
    [trainers, _] = worker_groups(
        job_of("digits", "trials.cpus=2", "session.num_cpus=8"), options()
    )
    assert trainers.cpus == 1 + 2


def test_workers_may_share_a_pod(job_of, options):
    job = job_of("digits", "trainers.workers=4", "trainers.gpus=0.5", "session.num_cpus=8")
    settings = options(trainers={"workers_per_pod": 4}, generators={"workers_per_pod": 2})
    groups = by_name(worker_groups(job, settings))
    assert (groups["trainers"].min_pods, groups["trainers"].gpus) == (1, 2)
    assert (groups["generators"].max_pods, groups["generators"].cpus) == (1, 2)


def test_generators_scale_to_zero_with_min_zero(job_of, options):
    [_, generators] = worker_groups(job_of("digits", "generators.min=0"), options())
    assert (generators.min_pods, generators.max_pods) == (0, 2)


@pytest.mark.parametrize(
    ("cpus", "pods", "cpus_per_pod"), [(1, 1, 1), (2, 1, 2), (8, 2, 4), (9, 3, 3)]
)
def test_jobs_of_tasks_are_sized_by_their_session(job_of, options, cpus, pods, cpus_per_pod):
    job = job_of("layer_search", f"session.num_cpus={cpus}")
    [group] = worker_groups(job, options())
    assert (group.name, group.min_pods, group.cpus) == ("trainers", pods, cpus_per_pod)
    assert group.min_pods * group.cpus >= cpus


def test_a_task_with_many_cpus_fits_one_pod(job_of, options):
    job = job_of("layer_search", "trials.cpus=6", "trials.gpus=1", "session.num_cpus=12")
    [group] = worker_groups(job, options())
    assert (group.min_pods, group.cpus, group.gpus) == (2, 6, 1)


@pytest.mark.parametrize(("cpus", "pods", "cpus_per_pod"), [(4, 1, 4), (9, 3, 3)])
def test_a_predict_job_gets_one_group_of_experts(predict_job, options, cpus, pods, cpus_per_pod):
    job = predict_job(f"session.num_cpus={cpus}", "experts.max=7", "experts.gpus=0.5")
    [experts] = worker_groups(job, options())
    assert (experts.name, experts.min_pods, experts.max_pods) == ("experts", pods, pods)
    assert (experts.cpus, experts.gpus) == (cpus_per_pod, -(-cpus_per_pod // 2))


def test_a_router_with_many_cpus_fits_one_pod(predict_job, options):
    job = predict_job("session.num_cpus=12", "experts.router_cpus=6")
    [experts] = worker_groups(job, options())
    assert (experts.min_pods, experts.cpus) == (2, 6)


def test_a_hub_job_has_trainers_and_no_experts(job_of, options):
    groups = worker_groups(job_of("hub"), options())
    assert [group.name for group in groups] == ["trainers"]


def test_a_job_without_workers_is_rejected(options):
    with pytest.raises(ConfigError, match="trainers, trials or experts"):
        worker_groups(SimpleNamespace(), options())
