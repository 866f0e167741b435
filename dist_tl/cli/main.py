"""The `dist-tl` command: verbs only.

Exit codes: 0 done, 2 bad input, 3 failed and can be started again, 130 interrupted.
"""

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from dist_tl.cli.display import TerminalProgress, console, errors, show_table
from dist_tl.cli.remote import AsJson, logs, scale, status, stop
from dist_tl.cli.submit import JobFile, Options, Overrides, kube_plan, show_kube_plan, submit
from dist_tl.errors import ConfigError, DataError, DistTLError, SupersededError
from dist_tl.telemetry import configure_logging, redact

if TYPE_CHECKING:  # these take seconds to import, and --help needs none of them
    from dist_tl.jobs.hub.cost import HubRow
    from dist_tl.jobs.plan import TrainRow
    from dist_tl.report.results import AnyResults

BAD_INPUT, FAILED, INTERRUPTED = 2, 3, 130
GOES_ON = "stopped; the same command goes on from what is committed"

app = typer.Typer(
    name="dist-tl",
    help="""Get the best target model from little labelled data, without the source data.

    A job is a YAML file; `launch/presets` has some to start from. Any of its keys can be changed
    on the command line by its path, e.g. [bold]target.labels_per_class=10 run=runs/k10[/bold].

    dist-tl plan JOB.yaml     check a job and see what it will do; starts nothing\n
    dist-tl run JOB.yaml      run it; the same command goes on after an interruption\n
    dist-tl forecast JOB.yaml how much labelled data each feature map would need\n
    dist-tl report RUN        make the page of a finished run again\n
    dist-tl doctor            what this machine has, and what would not work on it\n
    dist-tl submit JOB.yaml   hand it to Kubernetes (--kube) or to a Ray cluster (--address URL)\n
    dist-tl status RUN        how far it is; also: logs [-f] RUN, stop RUN\n
    dist-tl scale RUN generators=4     change the generator pool while it runs

    Exit codes: 0 done, 2 bad input, 3 failed and can be started again, 130 interrupted.""",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def plan(
    job: JobFile,
    overrides: Overrides = None,
    kube: Annotated[
        bool, typer.Option("--kube", help="Also what it asks of Kubernetes, checked offline.")
    ] = False,
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """Check a job against its data; show its stages, shards, actors and checkpoints.

    Starts nothing and writes nothing.
    """
    from dist_tl.jobs.job_file import read_job
    from dist_tl.jobs.plan import plan_job

    spec = read_job(job, overrides or [])
    table = plan_job(spec)
    pods = kube_plan(spec, options) if kube else None
    if as_json:
        rows = {} if pods is None else {"pods": [row.model_dump(mode="json") for row in pods]}
        print(json.dumps({**table.model_dump(mode="json"), **rows}, indent=1))
        return
    console.print(f"run {table.run}, store {table.store}", highlight=False)
    show_table("Actors", ("role", "size"), list(table.actors.items()))
    if table.generate:
        show_table(
            "Pseudo samples (Ray actors)",
            ("stage", "shards", "samples", "MB at most"),
            [
                (row.stage, str(row.shards), str(row.samples), f"{row.bytes_at_most / 1e6:.1f}")
                for row in table.generate
            ],
        )
    if table.hub:
        _show_hub(table.hub)
    if table.tasks:
        rows = [(row.phase, str(row.tasks), row.what) for row in table.tasks]
        show_table("Tasks (Ray, phase after phase)", ("phase", "tasks", "what"), rows)
    if table.train:
        _show_training(table.train)
    if table.trials:
        console.print(f"and {table.trials} short trials for the lambda guards", highlight=False)
    if pods is not None:
        show_kube_plan(pods)


def _show_hub(hub: "Sequence[HubRow]") -> None:
    rows = [
        (
            row.part,
            f"{row.parameters:,}",
            f"{row.multiply_adds / 1e6:,.3f}",
            f"{row.serving_bytes / 1e6:,.1f}",
            f"{row.training_bytes / 1e6:,.1f}",
        )
        for row in hub
    ]
    header = ("part", "parameters", "million multiply-adds an image", "MB to serve")
    show_table("Hub (counted)", (*header, "MB to train, a worker"), rows)


def _show_training(train: "Sequence[TrainRow]") -> None:
    show_table(
        "Training (one worker group, in this order)",
        ("stage", "objective", "steps", "rows a step", "parameters", "MB a checkpoint"),
        [
            (
                row.stage,
                row.objective,
                str(row.steps),
                str(row.rows_per_step),
                "of its trunk" if row.parameters is None else f"{row.parameters:,}",
                "" if row.checkpoint_bytes is None else f"{row.checkpoint_bytes / 1e6:.1f}",
            )
            for row in train
        ],
    )


@app.command()
def run(job: JobFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Run a job on a private Ray cluster, or on the one RAY_ADDRESS names.

    Running the same job again goes on from what is committed. Ctrl-C stops cleanly.
    """
    from dist_tl.jobs.job_file import read_job

    spec = read_job(job, overrides or [])
    from dist_tl.jobs.run import open_store, run_job
    from dist_tl.report.collect import write_report

    # Ray writes about lost workers to stdout, which belongs to the results alone.
    with TerminalProgress() as progress, redirect_stdout(sys.stderr):
        results = run_job(spec, progress)
    if results is None:
        return
    with open_store(spec) as store:
        page = write_report(store)
    if as_json:
        print(results.model_dump_json(indent=1))
        return
    _show_results(results)
    minutes, seconds = divmod(round(results.wall_seconds), 60)
    console.print(
        f"{minutes} min {seconds} s, peak memory {results.peak_memory_bytes / 2**30:.1f} GiB; "
        f"page: {results.run}/{page}",
        highlight=False,
        markup=False,
    )


@app.command()
def forecast(job: JobFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say how much labelled target data each feature map would need, and how sure that is.

    For jobs of kind forecast: the same as `run`. Candidates are pixels, random features, and any
    block of trained networks; the forecast is checked on held-out labels.
    """
    from dist_tl.jobs.job_file import read_job

    spec = read_job(job, overrides or [])
    if spec.kind != "forecast":
        raise ConfigError(
            f"{job}: kind: expected forecast, got {spec.kind}; start it with `dist-tl run`, or see "
            "launch/presets/forecast.yaml"
        )
    run(job, overrides, as_json)


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder or URL of a finished run.")],
    as_json: AsJson = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the results table as Markdown.")
    ] = False,
) -> None:
    """Make the page of a finished run again, and print its table."""
    from dist_tl.report.collect import read_results, write_report
    from dist_tl.report.summary import markdown_tables
    from dist_tl.storage.objects import ObjectStore

    store = ObjectStore(run)
    results = read_results(store)
    page = write_report(store)
    if as_json:
        print(results.model_dump_json(indent=1))
    elif markdown:
        print(markdown_tables(results), end="")
    else:
        _show_results(results)
        console.print(f"page: {store.url}/{page}", highlight=False, markup=False)


def _show_results(results: "AnyResults") -> None:
    from dist_tl.report.summary import tables, verdict

    for table in tables(results):
        show_table(table.title, table.header, list(table.rows))
        if table.note:
            console.print(table.note, style="dim", highlight=False, markup=False)
    for finding in results.findings:
        console.print(f"- {finding}", highlight=False, markup=False)
    console.print(verdict(results), style="bold", highlight=False, markup=False)


@app.command()
def doctor(
    store: Annotated[
        str | None, typer.Option("--store", help="A store to try, e.g. s3://bucket/prefix.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what this machine has, and what would not work on it and why."""
    from dist_tl.jobs.doctor import examine

    checks = examine(store)
    if as_json:
        print(json.dumps([check.model_dump() for check in checks], indent=1))
    else:
        rows = [(check.name, check.state, check.finding) for check in checks]
        show_table("What this machine has", ("what", "state", "finding"), rows)
    if any(check.state == "fails" for check in checks):
        raise typer.Exit(FAILED)


for verb in (submit, status, logs, stop, scale):
    app.command()(verb)


def main() -> NoReturn:
    """Run the command; every named error becomes one message and an exit code."""
    configure_logging(logging.WARNING)
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except (typer.Exit, SystemExit) as leaving:
        code: Any = getattr(leaving, "exit_code", getattr(leaving, "code", 0))
        if code == INTERRUPTED:
            _say_how_to_go_on()
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort):
        _say_how_to_go_on()
        sys.exit(INTERRUPTED)
    except typer.TyperException as error:
        error.show()
        sys.exit(BAD_INPUT)
    except (ConfigError, DataError) as error:
        _explain(error)
        sys.exit(BAD_INPUT)
    except DistTLError as error:
        _explain(error)
        if not isinstance(error, SupersededError):  # another start goes on already
            _say_how_to_go_on()
        sys.exit(FAILED)


def _say_how_to_go_on() -> None:
    # Of the other verbs nothing goes on: they start nothing, or only watch.
    if sys.argv[1:2] in (["run"], ["forecast"]):
        errors.print(GOES_ON)


def _explain(error: DistTLError) -> None:
    text = redact(str(error))
    errors.print(f"{type(error).__name__}: {text}", style="red", markup=False, highlight=False)
