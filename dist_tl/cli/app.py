"""The `dist-tl` command: verbs only.

Exit codes: 0 done, 2 bad input, 3 failed and can be resumed, 130 interrupted, 143 terminated.
"""

import json
import logging
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from dist_tl.cli.display import TerminalProgress, console, show_table
from dist_tl.cli.endings import FAILED, exit_code, replace_unknown_characters, stop_on_sigterm
from dist_tl.cli.remote import AsJson, logs, scale, status, stop
from dist_tl.cli.submit import JobFile, Options, Overrides, kube_plan, show_kube_plan, submit
from dist_tl.errors import ConfigError
from dist_tl.jobs.kinds import KINDS
from dist_tl.telemetry import configure_logging

if TYPE_CHECKING:  # these take seconds to import, and --help needs none of them
    from dist_tl.jobs.plan import PlanTable
    from dist_tl.report.results import AnyResults

app = typer.Typer(
    name="dist-tl",
    help="""Get the best target model from little labelled data, without the source data.

    A job is a YAML file; `launch/presets` has examples. Override any of its keys by its path on the
    command line, e.g. [bold]target.labels_per_class=10 run=runs/k10[/bold].

    dist-tl plan JOB.yaml     check a job and list what it will do; starts nothing\n
    dist-tl run JOB.yaml      run it; the same command resumes after an interruption\n
    dist-tl forecast JOB.yaml how much labelled data each feature map would need\n
    dist-tl report RUN        rebuild the report of a finished run\n
    dist-tl doctor            check this machine: what works here, and what does not\n
    dist-tl submit JOB.yaml   submit to Kubernetes (--kube) or a Ray cluster (--address URL)\n
    dist-tl status RUN        progress of a run; also: logs [-f] RUN, stop RUN\n
    dist-tl scale RUN generators=4     resize the generator pool of a running job

    Exit codes: 0 done, 2 bad input, 3 failed and can be resumed, 130 interrupted (Ctrl-C),
    143 terminated (SIGTERM).""",
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
        bool, typer.Option("--kube", help="Also list the pods it requests, checked offline.")
    ] = False,
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """Check a job against its data; list its data and models, stages, shards and actors.

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
    _show_plan(table)
    if pods is not None:
        show_kube_plan(pods)


def _show_plan(table: "PlanTable") -> None:
    console.print(f"run {table.run}, store {table.store}", highlight=False)
    for given in table.overview.tables() if table.overview else ():
        show_table(given.title, given.header, list(given.rows))
        if given.note:
            console.print(given.note, style="dim", highlight=False, markup=False)
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
    for extra in table.tables:
        show_table(extra.title, extra.header, list(extra.rows))
    if table.tasks:
        rows = [(row.phase, str(row.tasks), row.work) for row in table.tasks]
        show_table("Tasks (Ray, one phase after another)", ("phase", "tasks", "work"), rows)
    if table.train:
        _show_training(table)
    if table.trials:
        console.print(f"and {table.trials} short trials for the lambda guards", highlight=False)


def _show_training(table: "PlanTable") -> None:
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
            for row in table.train
        ],
    )


@app.command()
def run(job: JobFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Run a job on a private Ray cluster, or on the one RAY_ADDRESS names.

    Running the same job again resumes from what is committed. Ctrl-C and SIGTERM stop cleanly.
    """
    from dist_tl.jobs.job_file import read_job

    spec = read_job(job, overrides or [])
    from dist_tl.jobs.run import run_job
    from dist_tl.storage.layout import REPORT

    # Ray writes about lost workers to stdout, which belongs to the results alone.
    with TerminalProgress() as progress, redirect_stdout(sys.stderr):
        results = run_job(spec, progress)
    if as_json:
        print(results.model_dump_json(indent=1, ensure_ascii=True))
        return
    _show_results(results)
    minutes, seconds = divmod(round(results.wall_seconds), 60)
    console.print(
        f"{minutes} min {seconds} s, peak memory {results.peak_memory_bytes / 2**30:.1f} GiB; "
        f"report: {results.run}/{REPORT}",
        highlight=False,
        markup=False,
    )


@app.command()
def forecast(job: JobFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Forecast how much labelled target data each feature map would need.

    Same as `run`, for jobs of kind forecast. Feature maps are pixels, random features and blocks of
    trained networks; each forecast is checked on held-out labels.
    """
    from dist_tl.jobs.job_file import read_job

    spec = read_job(job, overrides or [])
    if spec.kind != "forecast":
        raise ConfigError(
            f"{job}: kind: expected forecast, got {spec.kind}; run it with `dist-tl run`, or see "
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
    """Rebuild the report of a finished run, and print its tables."""
    from dist_tl.report.collect import read_results, write_report
    from dist_tl.report.summary import markdown_tables
    from dist_tl.storage.objects import ObjectStore

    store = ObjectStore(run)
    results = read_results(store)
    key = write_report(store)
    if as_json:
        print(results.model_dump_json(indent=1, ensure_ascii=True))
    elif markdown:
        print(markdown_tables(results), end="")
    else:
        _show_results(results)
        console.print(f"report: {store.url}/{key}", highlight=False, markup=False)


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
        str | None, typer.Option("--store", help="Also check a store, e.g. s3://bucket/prefix.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: what works here, what does not, and why."""
    from dist_tl.cli.doctor import examine

    checks = examine(store)
    if as_json:
        print(json.dumps([check.model_dump() for check in checks], indent=1))
    else:
        rows = [(check.name, check.state, check.finding) for check in checks]
        show_table("This machine", ("component", "state", "details"), rows)
    if any(check.state == "fails" for check in checks):
        raise typer.Exit(FAILED)


for verb in (submit, status, logs, stop, scale):
    app.command()(verb)


def main() -> NoReturn:
    """Runs the command; whatever ends it becomes one message and an exit code."""
    stop_on_sigterm()
    replace_unknown_characters()
    configure_logging(logging.WARNING)
    _list_kinds_in_help()
    sys.exit(exit_code(lambda: app(standalone_mode=False)))


def _list_kinds_in_help() -> None:
    kinds = "; ".join(f"{name} ({kind.summary})" for name, kind in KINDS.items())
    app.info.epilog = f"Kinds of jobs: {kinds}"
    for command in app.registered_commands:
        if command.callback in (plan, run, submit):
            command.epilog = app.info.epilog
