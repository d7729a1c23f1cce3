"""The training loop: takes a `TrainConfig` from nothing (or from a checkpoint) to a finished run.

The step itself is in step.py, the state in state.py, what is written in journal.py and
checkpoints.py; this file decides when each of them acts.
"""

import contextlib
import dataclasses
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch

from fastdcgan import models
from fastdcgan.data import Order, Packed, grid, inspect_source, make_feed, prepare, to_uint8
from fastdcgan.data.labels import Labels, class_names, labels
from fastdcgan.data.picture import atomic_write
from fastdcgan.errors import Collapsed, InputError, RunError
from fastdcgan.hardware import pick_device, use_allowed_threads
from fastdcgan.models.conditional import COLUMNS, by_class
from fastdcgan.training import checkpoints, distributed, folders, journal, plan, quality
from fastdcgan.training.config import TrainConfig, TrainResult
from fastdcgan.training.distributed import Ranks
from fastdcgan.training.interrupts import Interrupts
from fastdcgan.training.rates import Rates
from fastdcgan.training.readings import Meter, Readings
from fastdcgan.training.state import TrainState
from fastdcgan.training.step import READINGS
from fastdcgan.training.watch import ROLLBACKS, STOPS, TRY, News, Probe, Watch, new_seed
from fastdcgan.training.whole_step import WholeStep
from fastdcgan_kernels.choice.targets import implementation

SAMPLES = COLUMNS**2
CHECKPOINT_SECONDS = 120.0
WARM_UP_STEPS = 3
"""Steps of this process (compilation, allocator, caches) that are left out of images_per_second."""
AGREE_EVERY = 10
"""Under torchrun, the processes compare their signals and clocks every so many steps."""


def train(config: TrainConfig, on_evaluation: quality.OnEvaluation | None = None) -> TrainResult:
    """Trains as `config` says; see `TrainConfig` for what it can say.

    Writes to the run's folder: config.json, metrics.jsonl, tensorboard/, samples/, checkpoints/,
    and at the end netG.safetensors, netG_ema.safetensors, netD.safetensors and plot.png. SIGINT
    and SIGTERM end the run after the step under way, with a checkpoint; a second one ends the
    process at once. With `eval_every` there are evaluations.jsonl, netG_best.safetensors and
    checkpoints/best.pt, too.

    Args:
        config: what to train.
        on_evaluation: is called in the process that writes with each new row of evaluations.jsonl
            (step, images, seconds, fid, kid ...); where it returns True the run ends as it does
            after its last step.

    Returns:
        The result; with `dry_run` one of 0 steps, after printing the plan.

    Raises:
        InputError: the configuration cannot work: the message says why, and what to do.
        RunError: the run could not go on (losses not finite, disk full); the message names the
            last good checkpoint.
        Collapsed: `on_collapse` ended the run, after a checkpoint and the plot.
    """
    config.validate()
    quality.require(config)
    ranks = distributed.ranks_from_environment()
    device = pick_device(config.device, ranks.local_rank)
    use_allowed_threads()
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # every batch but the last of an epoch is alike
    if config.dry_run:
        return _dry_run(config, ranks, device)
    distributed.join(ranks, device)
    try:
        return _train(config, ranks, device, on_evaluation)
    finally:
        distributed.leave()


def _dry_run(config: TrainConfig, ranks: Ranks, device: torch.device) -> TrainResult:
    info = inspect_source(config.data, cache=config.cache)
    classes = class_names(config.data, cache=config.cache) if config.classes else None
    config = dataclasses.replace(config, channels=config.channels or info.channels)
    images = "number known after decoding" if info.count is None else f"{info.count:,} images"
    if ranks.writes:
        engine = plan.choose_engine(config, ranks, device)
        for line in plan.describe(
            config,
            engine,
            ranks,
            source=info.name,
            epoch_images=info.epoch_images,
            images=images,
            classes=classes,
        ):
            print(line)
        print("dry run: nothing was trained")
    nan = math.nan
    return TrainResult(0, nan, config.out or folders.RUNS, nan, nan, interrupted=False)


def _train(
    config: TrainConfig,
    ranks: Ranks,
    device: torch.device,
    on_evaluation: quality.OnEvaluation | None,
) -> TrainResult:
    target = None
    if config.resume is not None:
        target = distributed.from_first(folders.resolve_resume(config.resume, config.out))
    packed = _open_data(config, ranks)
    classes = labels(packed, config.cache) if config.classes else None
    config = dataclasses.replace(config, channels=packed.channels, resume=None)
    found = None if target is None else _load(target, ranks)
    config = _with_length_of_noise(config, packed, ranks, found and found[1])
    if found is not None:
        _refuse_changes(found[1], config, ranks)
    judge = None
    if config.eval_every is not None and ranks.writes:
        judge = quality.Quality(config, packed, device, on_evaluation=on_evaluation)
    name = f"{packed.name}-{config.net}{config.image_size}"
    out = distributed.from_first(
        folders.claim(config.out, target, name) if ranks.writes else folders.RUNS
    )
    config = dataclasses.replace(config, out=out)
    with folders.only_writer(out) if ranks.writes else contextlib.nullcontext():
        engine = plan.choose_engine(config, ranks, device)
        state = TrainState(
            config,
            device,
            scaling=engine.autocast == torch.float16,
            classes=None if classes is None else classes.names,
        )
        run = _Run(config, ranks, engine, state, packed, out, judge, classes)
        if found is not None:
            path, saved = found
            state.load_state_dict(saved)
            run.last_checkpoint, run.saved_step = path, state.step
            run.take_up_watch(saved)
            run.say(f"resuming {path} at step {state.step}")
            if saved["data"]["sha256"] != packed.sha256:
                run.say("the data is not what it was at that checkpoint; going on with what it is")
        else:
            for net, weights, name in (
                (state.netG, config.init_g, "netG"),
                (state.netD, config.init_d, "netD"),
            ):
                if weights is not None:
                    models.load_weights(net, weights, name=name)
            if state.ema is not None:
                state.ema.average.load_state_dict(state.netG.state_dict())
        if config.sync_bn and ranks.world > 1:
            distributed.synchronise_batch_norm(state.netG, device)
            distributed.synchronise_batch_norm(state.netD, device)
        if found is None:
            # Dropout differs between the processes; a resumed run keeps the state it was saved in.
            torch.manual_seed(config.seed + 1 + ranks.rank)
        return run.go()


def _with_length_of_noise(
    config: TrainConfig, packed: Packed, ranks: Ranks, saved: dict[str, Any] | None
) -> TrainConfig:
    """By default the instance noise fades over the run as it was when it began."""
    if not config.instance_noise or config.instance_noise_steps is not None:
        return config
    if saved is not None:
        steps = TrainConfig.from_json(saved["config"]).instance_noise_steps
    else:
        steps = plan.total_steps(config, packed.epoch_images, ranks)[0]
    return dataclasses.replace(config, instance_noise_steps=steps)


def _open_data(config: TrainConfig, ranks: Ranks) -> Packed:
    if config.classes:
        class_names(config.data, cache=config.cache)  # before a long packing that were for nothing

    def pack() -> Packed:
        return prepare(
            config.data,
            size=config.image_size,
            channels=config.channels,
            cache=config.cache,
            workers=config.workers,
        )

    # The first process packs; the others then find it done.
    packed = pack() if ranks.writes else None
    distributed.barrier()
    packed = packed or pack()
    batch = config.batch_size * config.n_critic * ranks.world
    if batch > packed.epoch_images:
        raise InputError(
            f"a batch of {batch} "
            + (f"(for {config.n_critic} updates of D) " if config.n_critic > 1 else "")
            + f"was asked for, and {config.data} has {packed.epoch_images} images"
            + (f" ({packed.skipped} could not be read)" if packed.skipped else "")
            + ": lower --batch-size or add images"
        )
    return packed


def _load(target: Path, ranks: Ranks) -> tuple[Path, dict[str, Any]]:
    if target.is_file():
        return target, checkpoints.load(target)
    say = print if ranks.writes else lambda line: None
    newest = checkpoints.Checkpoints(target / "checkpoints").newest(say)
    assert newest is not None  # resolve_resume saw some
    return newest


def _refuse_changes(saved: dict[str, Any], config: TrainConfig, ranks: Ranks) -> None:
    """A resumed run must compute what the interrupted one would have."""
    before = TrainConfig.from_json(saved["config"])
    # What counts is the global batch: two processes of 32 may go on with what one of 64 began.
    now = dataclasses.replace(config, batch_size=config.batch_size * ranks.world)
    before = dataclasses.replace(before, batch_size=before.batch_size * saved["world"])
    changed = before.differences(now)
    if changed:
        raise InputError(
            f"cannot resume: the configuration differs in {'; '.join(changed)}. Leave these as "
            "they were, or start a new run (weights can be taken over with --init-g and --init-d)"
        )


class _Run:
    """One run while it trains."""

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        engine: plan.Engine,
        state: TrainState,
        packed: Packed,
        out: Path,
        judge: quality.Quality | None,
        classes: Labels | None,
    ) -> None:
        self.config, self.ranks, self.state, self.packed, self.out = (
            config, ranks, state, packed, out,
        )  # fmt: skip
        self.engine = engine
        self.total, self.per_epoch = plan.total_steps(config, packed.epoch_images, ranks)
        batch = config.batch_size * config.n_critic * ranks.world
        self.order = Order(packed.n, packed.epoch_images, batch, config.seed)
        self.checkpoints = checkpoints.Checkpoints(
            out / "checkpoints", keep=config.keep, milestone_every=config.milestone_every
        )
        self.journal: journal.Journal | None = None
        self.last_checkpoint: Path | None = None
        self.saved_step = 0
        self.judge = judge
        self.pending: list[list[float]] = []
        self.last_row: dict[str, Any] = {}
        self.meter = Meter()
        fixed = torch.Generator().manual_seed(config.seed)
        self.fixed_z = torch.randn(SAMPLES, config.nz, 1, 1, generator=fixed).to(state.device)
        self.of_classes = None if classes is None else classes.numbers
        self.watch, self.probe = Watch(config), Probe(state, packed, self.fixed_z, self.of_classes)
        self.alarm: News | None = None
        """What --on-collapse is to act upon."""
        self.judged_step = -1
        self.rates = Rates(config, self.total)

    def say(self, line: str) -> None:
        if self.journal is not None:
            self.journal.say(line)
        elif self.ranks.writes:
            print(line, flush=True)

    def go(self) -> TrainResult:
        """Trains to the end, to the first signal, or to what else ends it."""
        try:
            with contextlib.ExitStack() as stack:
                return self._go(stack)
        except OSError as error:
            raise RunError(
                f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}: "
                f"the run stops at step {self.state.step}; {self._last_good()}"
            ) from error

    def _go(self, stack: contextlib.ExitStack) -> TrainResult:
        config, state, packed, engine = self.config, self.state, self.packed, self.engine
        interrupts = stack.enter_context(Interrupts())
        hflip = packed.hflip if config.hflip is None else config.hflip
        feed = make_feed(
            packed,
            order=self.order,
            device=state.device,
            rank=self.ranks.rank,
            world=self.ranks.world,
            hflip=hflip,
            dtype=engine.autocast or torch.float32,
            labels=self.of_classes,
        )
        stack.callback(feed.close)
        if self.ranks.writes:
            self.journal = stack.enter_context(self._open_journal())
        if self.judge is not None:
            self.judge.resume(self.out)
        readings = Readings(config.log_every, state.device)
        step = self.whole_step = WholeStep(
            state, feed, engine=engine, ranks=self.ranks, readings=readings, say=self.say
        )
        sample_every = config.sample_every or min(self.per_epoch, 500)
        start, stop, ended = state.step, False, ""
        missed = quality.is_due(config, start) and not (self.judge and self.judge.has(start))
        if distributed.from_first(missed):  # the run was stopped before this evaluation
            ended = self._evaluate()
        saved_at = began = time.monotonic()
        self.meter.lap(steady=False)
        while state.step < self.total and not (stop or ended):
            self.rates.set(state, seconds=time.monotonic() - began, rollbacks=self.watch.rollbacks)
            step()
            full = readings.count()
            now, done = state.step, state.step - start
            self.meter.count(self.order.batch_size(now - 1))
            log = now % config.log_every == 0 or now in (1, self.total)
            sample = now % sample_every == 0 or now in (1, self.total)
            # What the clock and the signals say differs between processes: they ask each other.
            stop, save = interrupts.seen, self._clock_says_save(saved_at)
            late = time.monotonic() - began >= 60 * (config.max_minutes or math.inf)
            if self.ranks.world > 1:
                stop, save, late = (
                    now % AGREE_EVERY == 0 and distributed.any_rank(flag)
                    for flag in (stop, save, late)
                )
            if late:
                ended = f"{config.max_minutes:g} minutes are over (--max-minutes)"
            last = now == self.total or late
            sample = sample or late
            evaluate = not stop and quality.is_due(config, now, last=last)
            save = save or stop or self._plan_says_save(now)
            save = save or (done == 1 and config.on_collapse == "rollback")
            if full or log or sample or save or evaluate or done in (1, WARM_UP_STEPS):
                self._read(readings, now)
                self.meter.lap(steady=done > WARM_UP_STEPS)
            seen: dict[str, float] = {}
            if log and self.watch.due(now):
                with self.meter.paused():
                    seen = self._probe()
                    self._tell(self.watch.look(now, seen))
            if log or stop:
                self._log(now, seen)
            if self.alarm is not None and config.on_collapse != "warn":
                self._act(self.alarm)
                self.alarm = None
                saved_at, self.saved_step = time.monotonic(), state.step
                continue
            with self.meter.paused():
                if sample:
                    self._sample(now)
                if save:
                    self._save()
                    saved_at = time.monotonic()
                if evaluate:
                    ended = self._evaluate() or ended
            if ended:
                self._log(now, {})
        self._checkpoint()
        interrupted = state.step < self.total and not ended
        best = "" if self.judge is None else f"; the best: {self.judge}"
        if interrupted:
            self.say(
                f"stopped at step {state.step} of {self.total}{best}; go on with: "
                f"python -m fastdcgan.train --resume {self.out}"
            )
        elif start < self.total:
            if state.step < self.total:
                self.say(
                    f"ended at step {state.step} of {self.total}: {ended}; --resume {self.out} "
                    "goes on"
                )
            self._finish(best)
        else:
            self.say(
                f"nothing to do: {self.out} is at step {state.step} of {self.total}; "
                "--epochs or --steps trains it longer"
            )
        return TrainResult(
            steps=state.step,
            images_per_second=self.meter.overall,
            out=self.out,
            loss_d=self.last_row.get("loss_d", math.nan),
            loss_g=self.last_row.get("loss_g", math.nan),
            interrupted=interrupted,
            best=None if self.judge is None else self.judge.best,
        )

    def _open_journal(self) -> journal.Journal:
        """Makes the folder ready, says the plan, and begins to write."""
        for unfinished in self.out.rglob(".*.tmp"):  # of a process that was killed
            unfinished.unlink()
        atomic_write(self.out / "config.json", partial(_write, self.config.to_json().encode()))
        for line in plan.describe(
            self.config,
            self.engine,
            self.ranks,
            source=self.packed.name,
            epoch_images=self.packed.epoch_images,
            images=f"{self.packed.epoch_images:,} images an epoch",
            classes=self.state.classes,
        ):
            self.say(line)
        self.say(f"writing to {self.out}")
        return journal.Journal(
            self.out,
            total=self.total,
            steps_per_epoch=self.per_epoch,
            start=self.state.step,
            tensorboard=self.config.tensorboard,
        )

    def _plan_says_save(self, now: int) -> bool:
        every = (self.config.checkpoint_every, self.config.milestone_every)
        return any(n is not None and now % n == 0 for n in every)

    def _clock_says_save(self, saved_at: float) -> bool:
        by_clock = self.config.checkpoint_every is None
        return by_clock and time.monotonic() - saved_at >= CHECKPOINT_SECONDS

    def _read(self, readings: Readings, now: int) -> None:
        rows = readings.take()
        for step, row in enumerate(rows, start=now - len(rows) + 1):
            values = dict(zip(READINGS, row, strict=True))
            if not (math.isfinite(values["loss_d"]) and math.isfinite(values["loss_g"])):
                raise RunError(self._diverged(f"the losses of step {step} are not finite"))
            self._tell(self.watch.loss(step, values["loss_d"]))
        self.pending += rows

    def _diverged(self, what: str) -> str:
        config = self.config
        if self.engine.autocast == torch.float16:
            cause = "fp16 may have overflowed: train without --amp"
        elif max(config.lr_g or config.lr, config.lr_d or config.lr) > 1e-3:
            cause = "the learning rate is high: the reference recipe's is 2e-4"
        elif config.init_g is not None or config.init_d is not None:
            cause = "the weights it began with may hold values that are not finite"
        else:
            cause = "training became unstable: a lower --lr, or another --seed"
        return f"{what}; likely cause: {cause}; {self._last_good()}"

    def _last_good(self) -> str:
        if self.last_checkpoint is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.last_checkpoint}"

    def _probe(self) -> dict[str, float]:
        """A measurement of the nets as they are. Synchronised BatchNorm makes it a collective, so
        every process takes part; all go by the first one's."""
        with implementation(self.whole_step.impl):
            return distributed.from_first(self.probe(self.whole_step.gradients()))

    def _tell(self, news: list[News]) -> None:
        for one in news:
            self.say(one.text)
            if self.journal is not None:
                self.journal.event(dataclasses.asdict(one))
            if one.began and one.kind in STOPS:
                self.alarm = one

    def _act(self, alarm: News) -> None:
        """Goes back to the last healthy checkpoint, or ends the run in good order."""
        healthy = self.watch.healthy_step
        if self.config.on_collapse == "rollback" and healthy is not None:
            if self.watch.rollbacks < ROLLBACKS:
                self._roll_back(alarm, healthy)
                return
            why = f"{ROLLBACKS} rollbacks did not help"
        elif self.config.on_collapse == "rollback":
            why = "there is no healthy checkpoint to go back to"
        else:
            why = "--on-collapse stop"
        self._save()
        if self.ranks.writes:
            journal.plot(self.out)
        last = ""
        if healthy is not None:
            last = f", the last healthy one {self.checkpoints.path(healthy)}"
        raise Collapsed(
            f"the run ends at step {self.state.step} ({alarm.kind}: {why}). Its checkpoint is "
            f"{self.checkpoints.path(self.state.step)}{last}. Start anew with {TRY[alarm.kind]}; "
            "or go on all the same: "
            f"python -m fastdcgan.train --resume {self.out} --on-collapse warn"
        )

    def _roll_back(self, alarm: News, to: int) -> None:
        """To the checkpoint of step `to`, which becomes another: so that a resumed run is rolled
        back, too. The order of the images, which is a function of --seed and step, stays."""
        state, config, count = self.state, self.config, self.watch.rollbacks + 1
        content = checkpoints.load(self.checkpoints.path(to))
        state.load_state_dict(content)
        self.whole_step.renew()
        self.watch.load_state_dict(content["watch"])
        self.watch.rollbacks = count
        rate = (config.lr_d or config.lr) / 2**count
        for group in state.optD.param_groups:
            group["lr"] = rate
        seed = new_seed(config.seed, count)
        torch.manual_seed(seed + self.ranks.rank)
        if state.generator is not None:
            state.generator.manual_seed(seed)
        self.pending, self.judged_step, self.rates.known = [], -1, False
        distributed.barrier()  # before the first process writes, all have read
        if self.journal is not None:
            self.checkpoints.drop_after(to)
            self._write_checkpoint()
            self.journal.rewind(to)
            text = (
                f"step {alarm.step}: rollback {count} of {ROLLBACKS}, to the healthy checkpoint of "
                f"step {to}, with other noise and D's rate halved to {rate:g}"
            )
            self.say(text)
            self.journal.event(
                {"kind": "rollback", "step": alarm.step, "to": to, "lr_d": rate, "text": text}
            )
        distributed.barrier()  # the rows are rewound
        if self.judge is not None:
            self.judge.resume(self.out)

    def take_up_watch(self, saved: dict[str, Any]) -> None:
        """Goes on watching where the checkpoint that is resumed left off."""
        if "watch" not in saved:
            return
        self.watch.load_state_dict(saved["watch"])
        if self.config.on_collapse != "warn":
            self.watch.rearm()
        healthy = self.watch.healthy_step
        if healthy is not None and not self.checkpoints.path(healthy).is_file():
            self.watch.healthy_step = None  # the run branched off into another folder

    def _log(self, now: int, measured: dict[str, float]) -> None:
        means = [sum(column) / len(column) for column in zip(*self.pending, strict=True)]
        if not means:
            return
        self.pending = []
        self.last_row = {
            "step": now,
            "epoch": self.order.epoch(now - 1) + 1,
            **dict(zip(READINGS, means, strict=True)),
            "images_per_second": self.meter.rate,
            "seconds": self._seconds(),
            **{name: value for name, value in measured.items() if math.isfinite(value)},
        }
        if self.journal is not None:
            self.journal.record(self.last_row)

    def _sample(self, now: int) -> None:
        if self.journal is not None:
            # As the two references draw theirs.
            statistics: Literal["batch", "running"] = (
                "batch" if self.config.net == "dcgan" else "running"
            )
            given: tuple[torch.Tensor, ...] = (self.fixed_z,)
            if self.state.classes is not None:
                given = by_class(self.fixed_z, self.state.classes)
            with implementation(self.whole_step.impl):
                images = models.sample(self.state.sampler, *given, statistics=statistics)
            self.journal.grid(now, grid(to_uint8(images), columns=COLUMNS))

    def _judge_health(self) -> None:
        """Whether a checkpoint of this step is one to go back to. In every process, once a step."""
        if self.judged_step != self.state.step:
            self.judged_step = self.state.step
            if self.watch.healthy(self.state.step, self._probe()):
                self.watch.healthy_step = self.state.step

    def _evaluate(self) -> str:
        """Scores the generator; in every process, why the run is to end now, or ""."""
        judge, state, row, why = self.judge, self.state, None, ""
        if judge is not None:
            self._refuse_broken_weights()
            with implementation(self.whole_step.impl):
                row = judge.score(state, self.order, seconds=self._seconds())
        if distributed.from_first(judge is not None and row is not None and judge.is_better(row)):
            self._checkpoint()
        if judge is not None and row is not None and self.journal is not None:
            why = judge.record(row, state, self.last_checkpoint, self.journal)
        return distributed.from_first(why)

    def _seconds(self) -> float:
        """Of training, in this process and those before it."""
        return self.meter.seconds + (0 if self.journal is None else self.journal.seconds)

    def _refuse_broken_weights(self) -> None:
        if not self.state.is_finite():
            raise RunError(
                self._diverged(f"the weights after step {self.state.step} are not finite")
            )

    def _checkpoint(self) -> None:
        """Saves, unless this step has been saved."""
        if self.saved_step != self.state.step:
            self._save()

    def _save(self) -> None:
        self.saved_step = self.state.step
        self._judge_health()
        if self.ranks.writes:
            self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        self._refuse_broken_weights()
        content = self.state.state_dict()
        content["data"] = {"name": self.packed.name, "sha256": self.packed.sha256}
        content["world"] = self.ranks.world
        content["watch"] = self.watch.state_dict()
        self.last_checkpoint = self.checkpoints.save(content, spare=self.watch.healthy_step)

    def _finish(self, best: str) -> None:
        if not self.ranks.writes:
            return
        nets = {"netG": self.state.netG, "netD": self.state.netD}
        if self.state.ema is not None:
            with implementation(self.whole_step.impl):
                nets["netG_ema"] = self.state.finished()
        for name, net in nets.items():
            path = self.out / f"{name}.safetensors"
            checkpoints.save_weights(net, path, step=self.state.step)
        plotted = journal.plot(self.out)
        self.say(f"{self.meter.overall:.1f} images/s; nets, samples and {plotted} are done{best}")


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)
