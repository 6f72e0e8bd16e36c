"""The command line: reads arguments, calls one function, prints. Nothing heavy at start."""

import contextlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from nasattn.errors import DeviceLost, Stopped, TrialFailed, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import NoReturn

    from nasattn.config import Experiment
    from nasattn.search.study import Study

T = TypeVar("T")

INTERRUPTED = 130  # Typer's code for Ctrl-C where no command has an answer of its own

app = typer.Typer(
    help="Find where to place light non-local attention in a mobile network, within a budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ExperimentFile = Annotated[
    Path | None,
    typer.Argument(metavar="[EXPERIMENT.yaml]", help="The experiment; or name the study itself."),
]


def _at_home(url: str | None) -> str | None:
    from nasattn.config import at_home

    return None if url is None else at_home(url)


Storage = Annotated[
    str | None,
    typer.Option(
        help="Database URL, such as sqlite:///runs/nasattn.db.", metavar="URL", callback=_at_home
    ),
]
StudyName = Annotated[
    str | None, typer.Option("--study", help="The study's name in the database.", metavar="NAME")
]
Trials = Annotated[
    int | None,
    typer.Option(min=1, help="Finished trials in the whole study, the baseline counted."),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes that train.")]
Launcher = Annotated[
    str, typer.Option(help="Where they run: local (this machine) | ray | slurm.", metavar="NAME")
]
Retry = Annotated[bool, typer.Option("--retry", help="Also train again what has failed.")]
LauncherOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--launcher-option",
        help="For slurm, such as partition=gpu or time=60 (minutes); may be given again.",
        metavar="KEY=VALUE",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs: JSON on standard output.")]


@app.command()
def search(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml")],
    trials: Trials = None,
    storage: Storage = None,
    workers: Workers = None,
    retry: Retry = False,
    launcher: Launcher = "local",
    launcher_option: LauncherOptions = None,
    new_study: Annotated[
        bool, typer.Option("--new-study", help="Begin anew, as NAME-2 where NAME is taken.")
    ] = False,
) -> None:
    """Search, or go on where the search stopped. Ctrl-C at any time: nothing finished is lost."""
    again = "the same command"
    with _loading():
        from nasattn.search.database import shown
        from nasattn.search.opening import find_study, free_name

        loaded = _experiment(experiment, storage)
        if new_study:
            name = free_name(loaded.storage, loaded.study)
            again = f"nasattn resume --study {name} --storage '{shown(loaded.storage)}'"
            print(f"new study: {name}; other commands take `--study {name}` beside the file")
            loaded = loaded.model_copy(update={"study": name})
        found = find_study(loaded.storage, loaded.study)
    asked = trials or loaded.search.trials
    _search(loaded, found, asked, workers, retry, launcher, launcher_option, again)


@app.command()
def resume(
    storage: Annotated[
        str,
        typer.Option(
            envvar="NASATTN_STORAGE", help="Database URL.", metavar="URL", callback=_at_home
        ),
    ],
    study: Annotated[str, typer.Option(help="The study's name.", metavar="NAME")],
    trials: Trials = None,
    workers: Workers = None,
    retry: Retry = False,
    launcher: Launcher = "local",
    launcher_option: LauncherOptions = None,
) -> None:
    """Go on with a study from its database alone: the experiment is stored in it."""
    found = _study(None, storage, study)
    _search(found.config, found, trials, workers, retry, launcher, launcher_option)


@app.command()
def pareto(
    experiment: ExperimentFile = None,
    storage: Storage = None,
    study: StudyName = None,
    as_json: AsJson = False,
) -> None:
    """Print the Pareto frontier, the plain backbone first."""
    found = _study(experiment, storage, study)
    if as_json:
        _json(found.frontier_rows())
    else:
        from nasattn.tables import print_final, print_frontier

        print_frontier(found)
        print_final(found)


@app.command()
def status(
    experiment: ExperimentFile = None,
    storage: Storage = None,
    study: StudyName = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until it is complete.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    as_json: AsJson = False,
) -> None:
    """Print how far a study is, what each worker does, and what failed and why."""
    found = _study(experiment, storage, study)
    from nasattn.search.display import Display
    from nasattn.search.watch import Follower
    from nasattn.search.watch import watch as follow
    from nasattn.tables import console, print_summary

    terminal = console()
    if as_json and watch:
        raise UserError("--watch is for people; --json prints the state once")
    if as_json:
        _json(found.summary())
    elif watch:
        follow(found, Display(terminal), interval)
    elif terminal.is_terminal:
        display = Display(terminal)
        Follower(found, display).look()
        terminal.print(display.panel())
        for text in found.remarks() + found.troubles():
            display.note(text)
    else:
        print_summary(found.summary())


@app.command()
def report(
    experiment: ExperimentFile = None,
    storage: Storage = None,
    study: StudyName = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; default: `report` in the study's own.")
    ] = None,
) -> None:
    """Draw the frontier, and which block does well at which site (PNG and SVG)."""
    from nasattn.report import write_report

    found = _study(experiment, storage, study)
    for path in write_report(found, out or found.folder / "report"):
        print(path)


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="Folder for the exported files.", metavar="DIR")],
    experiment: ExperimentFile = None,
    storage: Storage = None,
    study: StudyName = None,
    select: Annotated[
        str, typer.Option(help='knee | best | trial=N | a limit such as "macs<=1.1x".')
    ] = "knee",
) -> None:
    """Export one architecture of the frontier: YAML, weights, checked ONNX and a README."""
    from nasattn.export import ExportRefused, check_export, export_trial
    from nasattn.search.choice import Choice
    from nasattn.search.display import Display
    from nasattn.search.loop import weights_of_trial
    from nasattn.tables import console

    found = _study(experiment, storage, study)
    trial = Choice(found).named(select)
    check_export(out)
    print(f"exporting trial {trial.number} ...", file=sys.stderr, flush=True)
    trial, weights = weights_of_trial(found, trial, Display(console()))
    try:
        print(export_trial(found, trial, weights, out))
    except ExportRefused as error:
        print(f"nasattn: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


@app.command()
def gc(
    experiment: ExperimentFile = None,
    storage: Storage = None,
    study: StudyName = None,
    max_gb: Annotated[
        float | None, typer.Option(min=0, help="Largest size of what is kept.", metavar="X")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove weights and checkpoints that are not the frontier's, the baseline's or resumable."""
    from nasattn.search.gc import GB, collect, size_text

    found = _study(experiment, storage, study)
    limit = None if max_gb is None else max_gb * GB
    done = collect(found, limit=limit, dry_run=dry_run)
    store = found.config.artifacts
    for item in done.dropped:
        print(f"{item.path.relative_to(found.folder)}  {size_text(item.bytes)}  {item.why}")
    verb = "would free" if dry_run else "freed"
    places = f"{found.folder} and {store}" if store else f"{found.folder}"
    print(f"{verb} {size_text(done.freed)}; {size_text(done.left)} are kept in {places}")
    if store:
        freed, left = (size_text(done.shared(dropped=dropped)) for dropped in (True, False))
        print(f"of that in the store: {verb} {freed}; {left} are kept")
    for item in done.stuck:
        print(f"nasattn: {item.path} cannot be removed: it may be another user's", file=sys.stderr)
    if limit is not None and done.left > limit:
        print(
            f"nasattn: --max-gb: got {max_gb:g}; the frontier, the baseline and what is not "
            f"finished need {done.left / GB:.3g} GB",
            file=sys.stderr,
        )
    if done.stuck or (limit is not None and done.left > limit):
        raise typer.Exit(1)


@app.command()
def train(
    architecture: Annotated[Path, typer.Argument(metavar="ARCHITECTURE.yaml")],
    experiment: Annotated[Path, typer.Option(help="Data and schedule.", metavar="E.yaml")],
    out: Annotated[
        Path | None, typer.Option(help="Where the weights go; default: weights.safetensors.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: as in `pretrain`.")] = None,
    test: Annotated[bool, typer.Option(help="Also score on the test split, once.")] = False,
) -> None:
    """Train one architecture from scratch, for the full schedule (the experiment's `pretrain`)."""
    from rich.console import Console

    from nasattn.architecture import Architecture
    from nasattn.evaluate.candidate import train_architecture
    from nasattn.export import weights_path
    from nasattn.tables import progress

    console = Console(stderr=True, emoji=False)
    with progress(console, f"training {architecture.name}") as tick:
        figures = train_architecture(
            Architecture.load(architecture),
            _experiment(experiment),
            weights_path(out),
            epochs=epochs,
            on_test=test,
            tick=tick,
        )
    _json(figures)


@app.command()
def cost(
    target: Annotated[
        str, typer.Argument(metavar="ARCHITECTURE.yaml | EXPERIMENT.yaml | MODULE:FUNCTION")
    ],
    by_site: Annotated[bool, typer.Option("--by-site", help="Block by block.")] = False,
    shape: Annotated[
        str | None, typer.Option(help="Input of MODULE:FUNCTION's network, such as 3,224,224.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print what a network costs, or an experiment's baseline, budget and single insertions."""
    from nasattn.quote import parse_shape, quote

    found = quote(target, parse_shape(shape))
    if by_site and not found.get("by_block", found["by_site"]):
        raise UserError(
            f"--by-site: of {target}, which is no architecture, only the whole is known"
        )
    if as_json:
        _json(found)
        return
    from nasattn.tables import print_costs

    rows = found.get("by_block", found["by_site"]) if by_site or "limits" in found else []
    print_costs(rows, found["cost"])
    for key, text in found["notes"].items():
        print(f"{key}: {text}")


@app.command()
def profile(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml")],
    runtime: Annotated[str, typer.Option(help="torch | onnxruntime | executorch.")] = "torch",
    out: Annotated[
        Path | None, typer.Option(help="Default: the experiment's `latency`.", metavar="FILE")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu | cuda.")] = "cpu",
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Torch's tensors in this layout.")
    ] = False,
) -> None:
    """Time the backbone and each block on this machine, once: a latency table for searches.

    Stopped at any time, the same command goes on.
    """
    from nasattn.cost.latency import LatencyRefused, Target
    from nasattn.cost.profile import profile as measure
    from nasattn.cost.profile import read_space
    from nasattn.space import SearchSpace
    from nasattn.tables import counting

    fields, named = read_space(experiment)
    path = out or named or experiment.parent / f"latency-{runtime}.yaml"
    target = Target(runtime=runtime, device=device, channels_last=channels_last)
    try:
        with counting("profile") as progress:
            table = measure(SearchSpace.of(fields), path, target, progress=progress)
    except LatencyRefused as error:
        print(f"nasattn: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("\nstopped; what is measured is kept, the same command goes on", file=sys.stderr)
        raise typer.Exit(1) from None
    print(table.summary())
    print(f"table: {path}")


@app.command()
def blocks(
    shape: Annotated[str, typer.Option(help="A map's size.", metavar="C,H,W")] = "96,14,14",
    as_json: AsJson = False,
) -> None:
    """List the attention blocks: paper, options, and what each costs on one map."""
    from nasattn.cost.blocks import block_rows, parse_shape

    rows = block_rows(parse_shape(shape))
    if as_json:
        _json(rows)
    else:
        from nasattn.tables import print_blocks

        print_blocks(rows)


def _print_complete(found: "Study", experiment: "Experiment", total: int, *, anyway: bool) -> bool:
    """Print a study of so many trials where it is complete. Else, or where it is to go on `anyway`,
    say how far it is, before the seconds that it takes to load what trains: False."""
    from nasattn.search.opening import claim_folder
    from nasattn.search.study import finished
    from nasattn.tables import print_results

    with _loading():
        complete = _patiently(lambda: found.complete(experiment, total))
        done = _patiently(lambda: finished(found.trials))
    if complete and not anyway:
        claim_folder(found.storage, found.name)
        found.write_frontier()
        found.write_final()
        print(found.completion())
        print_results(found)
        return True
    told = f"{done:,} of {total:,} trials are done"
    if done > total:
        told = f"{done:,} trials are done, {total:,} were asked for"
    print(f"the study '{found.name}': {told}", flush=True)
    return False


def _search(
    experiment: "Experiment",
    found: "Study | None",
    trials: int | None,
    workers: int | None,
    retry: bool,
    launcher: str,
    options: list[str] | None,
    again: str = "the same command",
) -> None:
    """again: what goes on with it, for people."""
    from nasattn.tables import console, print_results

    total, count = trials or experiment.search.trials, workers or experiment.search.workers
    anyway = launcher != "local" or bool(options) or retry  # launchers are checked all the same
    if found and _print_complete(found, experiment, total, anyway=anyway):
        return

    with _loading():
        from nasattn.evaluate.device import check
        from nasattn.search.display import Display
        from nasattn.search.loop import Search
        from nasattn.search.workers import launcher as launcher_of
        from nasattn.search.workers import search_with

    if launcher == "local":
        check(experiment.trainer)
    _take_interrupts()
    display = Display(console())
    display.again = again
    start = launcher_of(launcher, options or [], experiment, display.note)
    try:
        if count > 1 or launcher != "local":
            study = search_with(experiment, trials, count, display, start, found, retry)
        else:
            with _loading():
                search = _patiently(lambda: Search(experiment, display, found))
            if retry:
                search.retry()
            study = search.run(trials)
    except DeviceLost as error:
        print(f"nasattn: {error}", file=sys.stderr, flush=True)
        _renew(experiment)
    except KeyboardInterrupt:
        print(f"\nstopped; what is finished is kept, {again} goes on", file=sys.stderr)
        raise typer.Exit(1) from None
    _patiently(lambda: print_results(study))


def _renew(experiment: "Experiment") -> "NoReturn":
    """Go on with the study as a new process, which is started as this one was."""
    import multiprocessing

    from nasattn.search.launchers import STORAGE

    os.environ[STORAGE] = experiment.storage
    for loader in multiprocessing.active_children():  # they would outlive this program
        loader.kill()
        loader.join()
    program = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    again = ["resume", "--study", experiment.study, "--workers", "1"]
    os.execv(sys.executable, [sys.executable, *program, *again])


def _take_interrupts() -> None:
    """From now on SIGTERM does what Ctrl-C does, and neither is lost.

    A cluster signals all processes at once, and who has started this one passes it on: a second
    signal, within seconds, must not cut off the first one's clean end. Within a `__del__`, such as
    the garbage collector calls after each training, Python drops an interrupt: it comes again.
    """
    import threading

    last, hook = float("-inf"), sys.unraisablehook

    def interrupt(number: int, frame: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 5.0:
            last = now
            raise KeyboardInterrupt

    def dropped(what: "sys.UnraisableHookArgs") -> None:
        nonlocal last
        if what.exc_type is KeyboardInterrupt:
            last = float("-inf")
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            hook(what)

    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = dropped


@contextlib.contextmanager
def _loading() -> "Iterator[None]":
    """While what is loaded stays: passes of the garbage collector over it took a fifth of a
    start."""
    import gc

    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # puts all that is there into the oldest generation, unseen
        gc.enable()


def _experiment(path: Path, storage: str | None = None) -> "Experiment":
    from nasattn.config import Experiment, storage_url

    experiment = Experiment.load(path)
    if storage is not None:
        try:
            experiment = experiment.model_copy(update={"storage": storage_url(storage)})
        except ValueError as error:
            raise UserError(f"--storage: {error}") from None
    return experiment


def _study(experiment: Path | None, storage: str | None, name: str | None) -> "Study":
    if experiment is not None:
        loaded = _experiment(experiment, storage)
        storage, name = loaded.storage, name or loaded.study
    if storage is None or name is None:
        raise UserError("which study? Give EXPERIMENT.yaml, or both --storage URL and --study NAME")
    with _loading():
        from nasattn.search.opening import load_study

        found = _patiently(lambda: load_study(storage, name))
        _patiently(found.frontier)  # reads all trials, which stay read
    return found


def _patiently(step: "Callable[[], T]") -> "T":
    """A step before or after the search. A person hears at once of a database that is away; a
    worker, who may come in a killed one's place, waits for it."""
    from nasattn.search.lease import PARENT
    from nasattn.search.outage import patiently

    if PARENT not in os.environ:
        return step()
    return patiently(step, lambda text: print(f"nasattn: {text}", file=sys.stderr, flush=True))


def _json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def main() -> None:
    """The command `nasattn`: exit code 0 done, 2 the input is wrong, 1 anything else."""
    # Read when numpy is loaded. A proposal's matrices are small: on a busy machine their threads
    # only wait for one another (1.5 s a proposal for 0.05).
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Read at the first product on a GPU: what evaluate.device asks for.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sys.stdout = sys.stdout or open(os.devnull, "w")  # none where the caller closed it
    if isinstance(sys.stdout, io.TextIOWrapper):  # a folder's name, and so a class's, may be any
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            app(standalone_mode=True)
        finally:
            with contextlib.suppress(BrokenPipeError):
                sys.stdout.flush()
    except UserError as error:
        print(f"nasattn: {error}", file=sys.stderr)
        sys.exit(2)
    except (TrialFailed, Stopped) as error:
        print(f"nasattn: {error}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
        print("\nnasattn: stopped", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        from nasattn.search.outage import broken_database, full, full_disk

        if full(error):
            try:
                sys.stdout.flush()
            except OSError:  # it would fail once more at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            told = str(full_disk(error))
        elif why := broken_database(error):
            told = f"the database cannot be used: {why}"
        else:
            raise
        print(f"nasattn: {told}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
