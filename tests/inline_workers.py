"""Workers of a run in the test process: no Ray, one rank, one shard after another."""

from contextlib import contextmanager
from types import SimpleNamespace

from dist_tl.cluster.generators import GeneratorActor, StageProgress
from dist_tl.cluster.tasks import _run_one, read_output
from dist_tl.jobs.stage_records import training_record
from dist_tl.jobs.workers import Workers
from dist_tl.shards.manifest import read_entry
from dist_tl.storage.attempts import Attempt
from dist_tl.train.spec import read_result
from dist_tl.train.stage import run_stage


class InlineWorkers(Workers):
    def __init__(self, attempt, progress):
        self.store, self.attempt, self.progress = attempt.store, attempt.number, progress
        self.session = SimpleNamespace(peak_memory_bytes=1, check=lambda: None, roles=False)
        self.generation, self._records, self._started = [], {}, {}

    def train(self, specs):
        results = []
        for spec in specs:
            result = read_result(self.store, spec)
            results.append(result or self._train_one(spec))
            self.record(training_record(results[-1], "train"))
            for line in results[-1].notes:
                self.progress.say(line)
        return results

    def _train_one(self, spec):
        attempt = Attempt(self.store, self.attempt)
        return run_stage(spec, self.store, rank=0, world_size=1, attempt=attempt)

    def train_apart(self, name, specs):
        return self.train(specs)

    def start_trials(self, name, specs):
        self._started[name] = self.train(specs)

    def trial_results(self, name):
        return self._started[name]

    def run_tasks(self, name, work, tasks, output):
        outputs = []
        for task in tasks:
            stored = read_output(self.store, task, output)
            if stored is None:
                text = _run_one(work, task, self.store.url, self.attempt, False)
                stored = output.model_validate_json(text)
            outputs.append(stored)
        return outputs

    def generate(self, spec, *, batch_size):
        actor, count = GeneratorActor(self.store.url, 1), spec.plan().num_shards
        stage = StageProgress(spec, [], count, count, count)
        for index in range(count):
            entry = read_entry(self.store, spec.name, index) or actor.fulfil(spec, index)
            stage.count(entry)
        self.generation.append(stage)

    def finish_generation(self):
        pass


@contextmanager
def open_inline_workers(job, attempt, progress):
    """Stands in for `dist_tl.jobs.run.open_workers`."""
    yield InlineWorkers(attempt, progress)
