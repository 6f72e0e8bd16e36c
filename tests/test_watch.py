"""What a person sees of a study from outside: the panel, the lines, and when they end."""

import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import FakeStudy
from rich.cells import cell_len
from rich.console import Console
from sqlalchemy.exc import OperationalError
from typer.testing import CliRunner

from nasattn import cli
from nasattn.errors import UserError
from nasattn.record import Cost, Trial
from nasattn.search import display as display_module
from nasattn.search import outage
from nasattn.search.display import REDRAW, Display, Worker, duration, sparkline
from nasattn.search.final import Evaluation, contenders
from nasattn.search.lease import BLIND, Heartbeats
from nasattn.search.study import Study, accuracy
from nasattn.search.watch import Follower, described, watch
from nasattn.tables import print_summary

FACTS = [
    {"host": "a", "pid": 12, "task": "trial 20: ccnet @ stage3.0", "share": 0.5, "accuracy": 0.8},
    {"host": "a", "pid": 9, "task": "waiting", "refused": 7},
]


@pytest.fixture(scope="module")
def whole(fake_study: FakeStudy) -> Study:
    """20 trials, the last two failed."""
    return fake_study(20, failures=2, search={"trials": 20})


class Running:
    """A study that is seen to go on: the first `count` of its trials, and these workers."""

    def __init__(self, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.facts = 0, list[dict[str, Any]]()
        trials = study.trials
        monkeypatch.setattr(Study, "trials", property(lambda s: trials[: self.count]))
        monkeypatch.setattr(Study, "workers", lambda s, beats=None: self.facts)


@pytest.fixture
def running(whole: Study, monkeypatch: pytest.MonkeyPatch) -> Running:
    return Running(whole, monkeypatch)


def plain() -> tuple[Display, io.StringIO]:
    text = io.StringIO()
    return Display(Console(file=text, width=200)), text


def panel(display: Display, width: int, height: int = 40) -> list[str]:
    console = Console(force_terminal=True, width=width, height=height, color_system=None)
    display.console = console
    with console.capture() as captured:
        console.print(display.panel())
    return captured.get().splitlines()


def test_who_looks_seldom_is_not_taken_for_one_that_was_away(
    whole: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[Heartbeats]()

    def looked(self: Study, beats: Heartbeats) -> list[Any]:
        made.append(beats)
        return []

    monkeypatch.setattr(Study, "workers", looked)
    watch(whole, plain()[0], 3600.0)
    assert {beats.blind for beats in made} == {3600 + BLIND}


def test_each_trial_is_told_once_and_the_end_is_seen(whole: Study, running: Running) -> None:
    display, text = plain()
    follower = Follower(whole, display)
    running.count, running.facts = 5, FACTS
    assert follower.look()
    assert text.getvalue() == "", "what is over is no news"
    for running.count in (5, 8, 8, 19):
        assert follower.look()
    running.count, running.facts = 20, FACTS[:1]
    assert follower.look(), "somebody works on"
    running.facts = []
    assert not follower.look(), "complete, and nobody works"
    lines = text.getvalue().splitlines()
    told = [int(m[1]) for line in lines if (m := re.match(r"trial +(\d+) ", line))]
    assert told == list(range(5, 20))
    failed = [line for line in lines if "failed: out of memory" in line]
    assert len(failed) == 2
    assert [line for line in lines if line.startswith("worker")] == [
        "worker pid 9 ended",
        "worker pid 12 ended",
    ]


def test_an_unfinished_study_without_workers_is_waited_for(whole: Study, running: Running) -> None:
    display, text = plain()
    follower = Follower(whole, display)
    running.count = 3
    assert follower.look()
    running.facts = FACTS
    assert follower.look()
    assert text.getvalue().splitlines() == ["worker pid 12 began", "worker pid 9 began"]


@pytest.mark.parametrize("width", [80, 120])
def test_the_panel_says_it_all_on_lines_that_fit(
    whole: Study, running: Running, width: int
) -> None:
    display, _ = plain()
    running.count, running.facts = 20, FACTS
    Follower(whole, display).look()
    lines = panel(display, width)
    assert all(cell_len(line) <= width for line in lines)
    text = "\n".join(lines)
    best = max(accuracy(t) for t in whole.trials if t.score)
    for said in (
        "20/20  18 scored, 2 failed",
        f"{best:.4f}  trial",
        f"{len(whole.frontier())} trials  hypervolume {whole.hypervolume():.4f}",
        "7 over budget or max_blocks",
        "50%  0.8000  trial 20: ccnet @ stage3.0",
        "waiting",
        "trial 19: out of memory",
    ):
        assert said in text, said


def test_what_was_interrupted_is_not_called_running(
    whole: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = whole.summary() | {"running": 2, "remarks": ["no more than chance"]}
    print_summary(summary | {"best": None})
    assert "  best  -\n" in capsys.readouterr().out
    print_summary(summary)
    assert (
        f"  best  {max(accuracy(t) for t in whole.trials if t.score):.4f}\n"
        in capsys.readouterr().out
    )
    told = "what is running was interrupted: the next search goes on with it"
    for workers in ([], [{"host": "a", "pid": 5}]):
        print_summary(summary | {"workers": workers})
        out = capsys.readouterr().out
        assert (told in out) == (not workers)
        assert "\n  no more than chance\n" in out
    display, _ = plain()
    display.begin(whole, 20)
    trials = [*whole.trials[:3], replace(whole.trials[3], state="running", score=None)]
    for now, said in (([], "1 interrupted"), ([Worker(task="trial 3")], "1 running")):
        display.show(now, trials, 0)
        assert f"3 scored, {said}" in "\n".join(panel(display, 80))


def test_many_workers_fit_a_low_terminal(whole: Study, running: Running) -> None:
    display, _ = plain()
    running.count = 20
    running.facts = [{"host": "a", "pid": pid, "task": "trains"} for pid in range(50)]
    Follower(whole, display).look()
    lines = panel(display, 80, height=24)
    assert len(lines) <= 24
    shown = sum("trains" in line for line in lines)
    assert shown > 0 and f"... and {50 - shown} more workers" in "\n".join(lines)


def test_a_panel_is_drawn_a_few_times_a_second_and_at_once_before_a_wait(
    whole: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, drawn = [0.0], list[str]()
    monkeypatch.setattr(display_module.time, "monotonic", lambda: now[0])
    display = Display(Console(file=io.StringIO(), force_terminal=True))
    monkeypatch.setattr(display.live, "update", lambda panel: drawn.append(display.task))
    display.begin(whole, 20)
    for _ in range(10):
        now[0] += REDRAW / 4
        display.start("trains")
        display.tick(0.5, None)
    assert 2 <= len(drawn) - 1 <= 3, "twenty events in two and a half times REDRAW"
    count = len(drawn)
    display.start("waits", waits=True)
    display.tick(0.9, None)
    assert drawn[count:] == ["waits"], "no event may follow a wait for long"
    display.tick(1.0, None)
    assert len(drawn) == count + 2, "the end of a training, too"


def test_workers_of_several_hosts_are_named_by_both() -> None:
    both = described([*FACTS, {"host": "b", "pid": 3}])
    assert [w.where for w in both] == ["a:9", "a:12", "b:3"]
    assert described(FACTS)[1] == Worker(
        where="pid 12", task="trial 20: ccnet @ stage3.0", share=0.5, accuracy=0.8
    )


def test_growth_is_the_hypervolume_of_each_prefix(whole: Study) -> None:
    scored: list[Trial] = [t for t in whole.trials if t.score]
    each = whole.growth(whole.trials, parts=100)
    assert each == pytest.approx([whole.hypervolume(scored[: n + 1]) for n in range(len(scored))])
    assert whole.growth(whole.trials, parts=4) == pytest.approx([each[i] for i in (3, 8, 12, 17)])
    assert each[-1] == pytest.approx(whole.hypervolume()) and each[0] < each[-1]
    assert whole.growth([]) == []


def test_a_sparkline_reaches_from_the_least_to_the_largest() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([0.3, 0.3]) == "▁▁"
    assert sparkline([]) == ""


def test_a_database_that_is_away_for_a_moment_is_waited_for(
    whole: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, fails = Follower.look, [True, False, True]

    def look(self: Follower) -> bool:
        if fails and fails.pop():
            raise OperationalError("select", {}, Exception("server closed the connection"))
        return looked(self)

    monkeypatch.setattr(Follower, "look", look)
    monkeypatch.setattr(outage, "pause", lambda seconds: None)
    display, text = plain()
    watch(whole, display, 0.01)
    assert not fails and text.getvalue().count("server closed the connection") == 2


def test_the_last_training_has_its_time_left_as_the_others(whole: Study) -> None:
    """When a trial has ended, its worker's share is not one of what is left."""
    display, text = plain()
    display.begin(whole, 20)
    display.start("trial 18: se")
    display.tick(1.0, 0.5)
    trials = whole.trials[:19]
    display.end(trials[18], trials, 0)
    seconds = [t.score.seconds for t in trials if t.score]
    left = duration(sum(seconds) / len(seconds))
    assert f"about {left} left]" in text.getvalue().splitlines()[-1]
    display.workers = [
        Worker(task="trial 18: se", share=1.0),
        Worker(task="trial 17: se", share=0.5),
    ]
    display.end(trials[18], trials, 0)
    assert [w.share for w in display.workers] == [0.0, 0.5]


def test_before_the_first_trial_the_time_left_is_as_was_estimated(
    fake_study: FakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    display, _ = plain()
    display.begin(fake_study(0), 20)
    display.start("training the plain backbone")
    assert display._left() == ""
    for ends, left in ((220.0, "about 2 min 00 s left"), (90.0, "")):
        display.ends = ends
        assert display._left() == left


def test_trials_are_told_with_the_costs_that_are_objectives(fake_study: FakeStudy) -> None:
    study = fake_study(3, objectives=["accuracy", "params"])
    display, text = plain()
    display.begin(study, 3)
    display.end(study.trials[2], study.trials, 0)
    line = text.getvalue().splitlines()[-1]
    assert f"  params {study.trials[2].cost.values['params']:,}  " in line and "macs" not in line


def test_the_backbones_training_is_told_once(whole: Study, running: Running) -> None:
    display, text = plain()
    follower = Follower(whole, display)
    task = "training the plain backbone, from which all go on"
    running.count = 1
    for _ in range(3):
        running.facts = [{"host": "a", "pid": 1, "task": task}, {"host": "a", "pid": 2}]
        follower.look()
    assert text.getvalue().count(f"worker pid 1: {task} ...") == 1


def test_what_is_remarked_by_a_worker_is_told_by_who_follows_it(fake_study: FakeStudy) -> None:
    study = fake_study(3, failures=0)
    study.remark("the first")
    display, text = plain()
    follower = Follower(study, display)
    for _ in range(2):
        follower.look()
    assert "the first" not in text.getvalue(), "it is no news"
    for _ in range(2):
        study.remark("the plain backbone is trained: no more than chance")
        follower.look()
    assert text.getvalue().count("no more than chance") == 1
    assert study.summary()["remarks"] == study.remarks()
    assert study.remarks() == ["the first", "the plain backbone is trained: no more than chance"]


def test_who_looks_on_a_study_that_nobody_works_on_is_told(
    whole: Study, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    for facts, told in (([], 1), (FACTS, 0)):
        running.count, running.facts = 5, list(facts)
        display, text = plain()

        def stop(seconds: float) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("time.sleep", stop)
        watch(whole, display, 0.01)
        assert text.getvalue().count("nobody works on it") == told


def test_the_final_is_followed_too(fake_study: FakeStudy) -> None:
    study = fake_study(6, failures=1, search={"trials": 6}, final={"seeds": 1, "test": False})
    display, text = plain()
    follower = Follower(study, display)
    asked = study.final_progress(study.trials)
    assert asked is not None and follower.look(), "nobody works on it, but it is not over"
    assert text.getvalue() == "", "which a panel or a first line tells"
    for count, contender in enumerate(contenders(study.trials, study.frontier()), 1):
        reason = "" if count > 1 else "out of memory"
        made = Evaluation(
            seed=0,
            architecture=contender.architecture,
            cost=Cost(values={}),
            val=None if reason else 0.8,
            reason=reason,
        )
        study.optuna.set_user_attr(made.name, made.as_dict())
        over = count == asked["evaluations"]
        assert follower.look() is not over
        (told,) = text.getvalue().splitlines()[count - 1 :]
        outcome = f"failed: {reason}" if reason else "val 0.8000"
        assert told.startswith(f"final, seed 0: {outcome}")
        assert told.endswith(f"[{asked['evaluations'] - count} to go]")
    again = Follower(study, display)
    assert not again.look() and len(text.getvalue().splitlines()) == count, (
        "what is over is no news"
    )
    (row,) = (line for line in panel(display, 120) if line.startswith("final"))
    assert row.rstrip().endswith(f"{count} of {count} evaluations, 1 failed")


def test_a_study_may_be_named_beside_a_file(whole: Study, tmp_path: Path) -> None:
    """As `--new-study` names another than the file."""
    file = tmp_path / "experiment.yaml"
    fields = whole.config.as_dict() | {"study": "other", "storage": whole.storage}
    file.write_text(yaml.safe_dump(fields))
    done = CliRunner().invoke(cli.app, ["status", str(file), "--study", whole.name])
    assert done.exit_code == 0 and f"study  {whole.name}" in done.stdout
    missing = CliRunner().invoke(cli.app, ["status", str(file)])
    assert isinstance(missing.exception, UserError) and "'other'" in str(missing.exception)


def test_the_command_ends_with_a_complete_study(whole: Study) -> None:
    code = "from nasattn.cli import main; main()"
    arguments = ["--storage", whole.storage, "--study", whole.name]
    run = subprocess.run(
        [sys.executable, "-c", code, "status", "--watch", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("fake: 20 of 20 trials, best 0.")
