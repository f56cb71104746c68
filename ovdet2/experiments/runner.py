"""The runner: makes the artefacts of entries, runs entries for seeds, resumes, and collects the results."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ovdet2.config import load_config
from ovdet2.data.datasets.register import require_choice_allowed
from ovdet2.errors import DataError
from ovdet2.experiments import command
from ovdet2.experiments.entry import Artefact, Entry, Experiment
from ovdet2.experiments.evaluation import SharedDetector
from ovdet2.experiments.readings import count_readings, log_reading
from ovdet2.experiments.state import content_hash, differing, is_complete, read_state, recorded, text_hash
from ovdet2.experiments.table import make_table, value_of
from ovdet2.io.files import read_json

TRAINING_PROGRAM = "ovdet2.programs.train"
Results = dict[str, list[dict[str, Any]]]


class Runner:
    """Runs the entries of one experiment in one folder."""

    def __init__(self, experiment: Experiment, output: str | Path, passed_on: Sequence[str] = ()) -> None:
        """
        Args:
            experiment: the entries.
            output: folder of their files, or that ``experiment.folder`` is in.
            passed_on: further arguments of the training program, "--num-gpus 8 KEY VALUE".
        """
        self.experiment, self.output, self._passed_on = experiment, Path(output) / experiment.folder, list(passed_on)
        source = experiment.weights_from
        self._source = Runner(source, output, passed_on) if source else None
        self._overrides = command.overrides_in(passed_on)
        self._artefacts: dict[str, Path] = {}
        self._configs: dict[tuple[str, int], tuple[CfgNode | None, dict[str, str]]] = {}
        self._detector = SharedDetector()

    def run(self, name: str, seed: int = 0) -> Path:
        """Make the artefacts of an entry, train and evaluate it with one seed unless that is done; returns its folder.

        Raises:
            DataError: its folder, or an artefact, was made with other inputs, which are named, or does not record them.
            UsageError: it would read a held-out test set and the experiment makes no final table.
            SystemExit: a program failed; with its exit code.
        """
        entry, folder = self.experiment.entries[name], self.folder(name, seed)
        self._require_choice_allowed(name, seed)
        weights = self._weights(entry, seed)
        artefacts = {need: self.artefact(need) for need in entry.needs}
        inputs = self._inputs(name, seed, weights, artefacts)
        state = self._state(name, seed, inputs)
        if self._is_done(name, seed, state):
            return folder
        print(f"== {name}" + (f", seed {seed}" if entry.is_seeded else ""), flush=True)
        state = {key: value for key, value in state.items() if key != "done"}
        with recorded(folder / "row.json", state, inputs) as current:
            given = ["OUTPUT_DIR", str(folder), *self._given(weights, artefacts)]
            self._execute(name, seed, given, inputs.get("weights", ""))
            if entry.facts is not None:
                current["facts"] = entry.facts(self._load(name, seed, given))
        return folder

    def artefact(self, name: str) -> Path:
        """The path of an artefact, made if it is not there.

        Raises:
            DataError: it was made with other inputs, or one that the user provides does not exist.
        """
        if name not in self.experiment.artefacts and self._source:
            return self._source.artefact(name)
        if name not in self._artefacts:
            artefact = self.experiment.artefacts[name]
            path = self.output / artefact.path
            if artefact.command:
                self._make(name, artefact, path)
            elif not is_complete(path):
                raise DataError(f"the {artefact.title} {path} does not exist: check the path.")
            self._artefacts[name] = path
        return self._artefacts[name]

    def folder(self, name: str, seed: int = 0) -> Path:
        """Of the files of an entry with one seed."""
        values = {"name": name.replace(" ", "_").replace("+", "plus"), "seed": seed}
        return self.output / command.fill([self.experiment.entries[name].folder], values)[0]

    def result(self, name: str, seed: int = 0) -> dict[str, Any] | None:
        """The report of a finished entry with its "minutes" and "facts"; None where it was not run to its end.

        Raises:
            DataError: it is of another configuration, or does not record its configuration.
            UsageError: as of :meth:`run`.
        """
        self._require_choice_allowed(name, seed)
        state = self._state(name, seed, self._config(name, seed)[1])
        if not self._is_done(name, seed, state):
            return None
        known = {key: state[key] for key in ("minutes", "facts") if key in state}
        if self._source:
            known["readings"] = count_readings(self._source.output, name)
            known |= self._source.recorded_minutes(name, seed)
        return read_json(self._report(name, seed)) | known | {"settings_by": self.experiment.entries[name].settings_by}

    def recorded_minutes(self, name: str, seed: int) -> dict[str, float]:
        """{"minutes": those recorded for an entry}; empty if it was not run."""
        state = read_state(self.folder(name, seed) / "row.json") or {}
        return {key: state[key] for key in ("minutes",) if key in state}

    def results(self, names: Iterable[str], seeds: Sequence[int]) -> Results:
        """{name: results of the seeds that are done}, each with its "seed"."""
        results: Results = {}
        for name in names:
            chosen = seeds if self.experiment.entries[name].is_seeded else seeds[:1]
            reports = [(seed, self.result(name, seed)) for seed in chosen]
            results[name] = [report | {"seed": seed} for seed, report in reports if report is not None]
        return results

    def table(self, results: Results) -> str:
        """Markdown table of :meth:`results`, and the minutes that artefacts took."""
        lines = [make_table(self.experiment, results)]
        needed = {need for name in results for need in self.experiment.entries[name].needs}
        for name, artefact in self.experiment.artefacts.items():
            state = (
                read_state(_state_file(self.output / artefact.path)) if name in needed and artefact.command else None
            )
            if state is not None:
                minutes = state["minutes"]
                lines.append(f"\nThe {artefact.title}, made once for all rows and seeds, took {minutes:.1f} minutes.")
        return "\n".join(lines)

    def rows(self, results: Results) -> list[dict[str, Any]]:
        """A flat dict for each of :meth:`results`: "row", "seed", "minutes", its facts, its figures by key."""
        rows = []
        for name, seeds in results.items():
            for result in seeds:
                row = {"row": name, "seed": result["seed"], "minutes": result.get("minutes")}
                if not self.experiment.entries[name].is_seeded:
                    del row["seed"]
                columns = [column for column in self.experiment.columns.values() if column.path[0] != "facts"]
                figures = {column.path[-1]: value_of(column, result) for column in columns}
                rows.append(row | result.get("facts", {}) | figures)
        return rows

    def _make(self, name: str, artefact: Artefact, path: Path) -> None:
        """Run the program of an artefact, unless that is done. One that was interrupted goes on."""
        inputs = {name: content_hash(source) for name, source in artefact.inputs.items()}
        values = {"path": path, "folder": path.parent}
        if artefact.weights_of:
            values["weights"] = self._trained(artefact.weights_of, 0)
            inputs["detector"] = content_hash(values["weights"])
        times = _state_file(path)
        state = read_state(times)
        different = differing(state, inputs) if state else []
        if different:
            raise DataError(f"{path} was made with another {' and '.join(different)}: remove it and {times}.")
        if is_complete(path) and (state["done"] if state and "done" in state else self._accepts(state)):
            return
        with recorded(times, {"minutes": (state or {}).get("minutes", 0.0)}, inputs):
            words = command.fill(artefact.command, values)
            self._log_reading(name, None, inputs.get("detector", ""), words)
            command.run_program(words)
            if not is_complete(path):
                raise DataError(
                    f"{path} is not complete yet: run the same command again once other processes are done."
                )

    def _accepts(self, state: dict[str, Any] | None) -> bool:
        return state is None and self.experiment.accept_unmarked

    def _weights(self, entry: Entry, seed: int) -> Path | None:
        """The weights that an entry evaluates; None for one that is trained."""
        if entry.weights:
            return Path(entry.weights)
        return self._trained(entry.weights_of, seed) if entry.weights_of else None

    def _trained(self, name: str, seed: int) -> Path:
        if self._source:
            return self._source._trained(name, seed)
        weights = self.run(name, seed) / "model_final.pth"
        if not weights.is_file():
            raise DataError(
                f"{weights} is needed and was removed: remove {weights.parent / 'row.json'} to train it again."
            )
        return weights

    def _config(self, name: str, seed: int) -> tuple[CfgNode | None, dict[str, str]]:
        """(configuration of an entry, without the claim of its yaml file, its hash); None for one with a program."""
        if (name, seed) not in self._configs:
            cfg = None if self.experiment.entries[name].command else self._load(name, seed)
            self._configs[name, seed] = cfg, {"configuration": text_hash(_inputs_in(cfg))} if cfg else {}
        return self._configs[name, seed]

    def _load(self, name: str, seed: int, given: Sequence[str] = ()) -> CfgNode:
        entry = self.experiment.entries[name]
        seeded = ["SEED", str(seed)] if entry.is_seeded else []
        overrides = [*self._overrides, *entry.overrides, *seeded, "TEST.EXPECTED_RESULTS", "[]", *given]
        return load_config(entry.config, overrides)

    def _inputs(self, name: str, seed: int, weights: Path | None, artefacts: dict[str, Path]) -> dict[str, str]:
        """Hashes of all that decides the result of an entry."""
        cfg, inputs = self._config(name, seed)
        inputs = inputs | self.experiment.inputs(cfg)
        inputs |= {"weights": content_hash(weights)} if weights else {}
        titles = {need: self._artefact_named(need).title for need in artefacts}
        return inputs | {titles[need]: content_hash(path) for need, path in artefacts.items()}

    def _state(self, name: str, seed: int, inputs: dict[str, str]) -> dict[str, Any]:
        """The state recorded in the folder of an entry; empty if there is no folder.

        Raises:
            DataError: the recorded inputs are others, or not recorded.
        """
        folder = self.folder(name, seed)
        state = read_state(folder / "row.json")
        if state is None:
            if folder.is_dir() and not (self.experiment.shared_detector or self.experiment.accept_unmarked):
                raise DataError(
                    f"{folder} holds a run that does not record its inputs: remove it, or choose another --output."
                )
            return {}
        different = differing(state, inputs)
        if different and self.experiment.shared_detector:
            return {}
        if different:
            raise DataError(
                f"{folder} holds a row made with another {', '.join(different)}: remove it, or choose another --output."
            )
        return state

    def _is_done(self, name: str, seed: int, state: dict[str, Any]) -> bool:
        """Whether an entry was run to its end."""
        if not self._report(name, seed).is_file():
            return False
        unmarked = not state and self.experiment.accept_unmarked and not self.experiment.shared_detector
        return state.get("done", unmarked and (self.folder(name, seed) / "model_final.pth").is_file())

    def _report(self, name: str, seed: int) -> Path:
        """Where the evaluator of an entry writes."""
        folder, (cfg, _) = self.folder(name, seed), self._config(name, seed)
        return folder / "report.json" if cfg is None else folder / "inference" / cfg.DATASETS.TEST[0] / "report.json"

    def _given(self, weights: Path | None, artefacts: dict[str, Path]) -> list[str]:
        """Overrides that name the files of an entry."""
        words = ["MODEL.WEIGHTS", str(weights)] if weights else []
        return words + [
            word for need, path in artefacts.items() for word in (self._artefact_named(need).key, str(path))
        ]

    def _artefact_named(self, name: str) -> Artefact:
        own = self.experiment.artefacts
        return own[name] if name in own or self._source is None else self._source._artefact_named(name)

    def _require_choice_allowed(self, name: str, seed: int) -> None:
        """Refuse an entry that would read a held-out test set.

        Raises:
            UsageError: it would, and the experiment makes no final table.
        """
        if self._source:
            return
        entry, (cfg, _) = self.experiment.entries[name], self._config(name, seed)
        artefacts = (self._artefact_named(need) for need in entry.needs)
        words = [word for artefact in artefacts for word in artefact.command]
        for dataset in (*(cfg.DATASETS.TEST if cfg else ()), *entry.command, *words):
            require_choice_allowed(dataset, f"the row {name} reads")

    def _log_reading(self, name: str, seed: int | None, weights: str, words: Sequence[str]) -> None:
        if self._source:
            log_reading(self._source.output, name, seed, weights, words)

    def _execute(self, name: str, seed: int, given: list[str], weights: str) -> None:
        """Train and evaluate, or evaluate, or run the program of an entry; ``weights`` is the hash of evaluated ones."""
        entry = self.experiment.entries[name]
        if entry.command:
            words = command.fill(entry.command, {"folder": self.folder(name, seed)})
            self._log_reading(name, None, weights, words)
            command.run_program(words)
        elif self.experiment.shared_detector:
            self._log_reading(name, seed if entry.is_seeded else None, weights, given)
            self._detector.evaluate(self._load(name, seed, given))
        else:
            trains = not (entry.weights_of or entry.weights)
            words = [TRAINING_PROGRAM, "--config-file", entry.config, "--resume" if trains else "--eval-only"]
            words += [*self._passed_on, *entry.overrides, *(["SEED", str(seed)] if entry.is_seeded else []), *given]
            self._log_reading(name, seed if entry.is_seeded else None, weights, words)
            command.run_program(words)


def _inputs_in(cfg: CfgNode) -> str:
    """The text of a configuration without the keys that change no figure of a run."""
    cfg = cfg.clone()
    cfg.defrost()
    for key in ("SETTING", "BOOTSTRAP"):
        cfg.TEST.pop(key, None)
    return cfg.dump()


def _state_file(path: Path) -> Path:
    """Where the state of an artefact is recorded."""
    return path.with_suffix(".json")
