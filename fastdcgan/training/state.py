"""Everything that a run is made of at one moment, and so everything that a checkpoint holds: nets,
average, optimisers, gradient scalers, random generators and the step, which is also the position
in the data."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdcgan import models
from fastdcgan.errors import InputError
from fastdcgan.training.config import TrainConfig
from fastdcgan.training.ema import EMA, settled
from fastdcgan_kernels import fuse
from fastdcgan_kernels.adam import Adam


def build_nets(
    config: TrainConfig, classes: Sequence[str] | None = None
) -> tuple[nn.Module, nn.Module]:
    """G and D as the configuration has them; `channels` must be filled in, and `classes` are the
    names of the data's, where the configuration wants them."""
    assert config.channels is not None
    assert config.classes == (classes is not None)
    return models.build(
        config.net,
        size=config.image_size,
        nz=config.nz,
        ngf=config.ngf,
        ndf=config.ndf,
        channels=config.channels,
        net_d=config.net_d,
        norm_g=config.norm_g,
        norm_d=config.norm,
        spectral_norm=config.spectral_norm,
        minibatch_std=config.minibatch_std,
        classes=classes,
    )


class TrainState:
    """The state of a run after `step` steps.

    Args:
        config: with `channels` filled in. Unless its `impl` is "reference", both nets are fused.
        device: where the nets live, in channels_last.
        dtype: of the parameters; float32 but in tests.
        scaling: whether gradients are scaled (fp16).
        classes: names of the data's classes, with the configuration's `classes`.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        scaling: bool = False,
        classes: Sequence[str] | None = None,
    ) -> None:
        torch.manual_seed(config.seed)
        netG, netD = build_nets(config, classes)
        if config.init == "resize":
            models.begin_as_resizing(netG)
        place: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "memory_format": torch.channels_last,
        }
        self.config = config
        self.classes = None if classes is None else tuple(classes)
        self.device = device
        self.netG: nn.Module = netG.to(**place)
        self.netD: nn.Module = netD.to(**place)
        if config.impl != "reference":
            fuse(self.netG)
            fuse(self.netD)
        self.ema = EMA(self.netG, config.ema_decay) if config.ema else None
        self.optG = _adam(self.netG, config.lr_g or config.lr, config, device)
        self.optD = _adam(self.netD, config.lr_d or config.lr, config, device)
        if self.ema is not None:
            self.optG.average = self.ema.moving
        self.scalers = [torch.amp.GradScaler(device.type, enabled=scaling) for _ in range(2)]
        # Crops, flips and noise come from a generator of our own, so that nothing else that draws
        # random numbers in this process moves them. Dropout draws from torch's.
        self.generator: torch.Generator | None = None
        if device.type != "meta":
            self.generator = torch.Generator(device).manual_seed(config.seed)
        self.step = 0
        # The step once more, on the device, where something in a step depends on it: a CUDA graph
        # repeats whatever the host gives it.
        self.clock = torch.zeros((), device=device) if config.instance_noise else None

    @property
    def sampler(self) -> nn.Module:
        """The generator to draw samples from: the average where there is one."""
        return self.netG if self.ema is None else self.ema.average

    def finished(self) -> nn.Module:
        """The generator to keep and to score: the sampler, its average `settled`."""
        return self.netG if self.ema is None else settled(self.ema.average)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and containers of them: loads with weights_only=True."""
        state: dict[str, Any] = {
            "step": self.step,
            "config": self.config.to_json(),
            "netG": self.netG.state_dict(),
            "netD": self.netD.state_dict(),
            "optG": self.optG.state_dict(),
            "optD": self.optD.state_dict(),
            "scalers": [scaler.state_dict() for scaler in self.scalers],
            "rng": {"torch": torch.get_rng_state()},
        }
        if self.generator is not None:
            state["rng"]["run"] = self.generator.get_state()
        if self.device.type == "cuda":
            state["rng"]["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.ema is not None:
            state["ema"] = self.ema.average.state_dict()
        if self.classes is not None:
            state["classes"] = list(self.classes)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, on this state's device.

        Random states of another kind of device are left out: a run that moves from a GPU to a CPU
        goes on, but not bit for bit.

        Raises:
            InputError: it is of other classes.
        """
        before = state.get("classes")
        if before is not None and tuple(before) != self.classes:
            raise InputError(
                f"cannot resume: the data's classes were {', '.join(before)} and are now "
                f"{', '.join(self.classes or ())}: give the data as it was"
            )
        models.load_weights(self.netG, state["netG"], name="netG")
        models.load_weights(self.netD, state["netD"], name="netD")
        if self.ema is not None:
            models.load_weights(self.ema.average, state["ema"], name="ema")
            self.ema.updates.fill_(state["step"])
        for optimiser, name in ((self.optG, "optG"), (self.optD, "optD")):
            # Not those of the device that it was saved on; and of the configuration, because old
            # runs kept Keras's epsilon as it was in their last step.
            here = _adam_options(self.device) | {"eps": optimiser.param_groups[0]["eps"]}
            groups = [{**group, **here} for group in state[name]["param_groups"]]
            optimiser.load_state_dict({**state[name], "param_groups": groups})
        for scaler, saved in zip(self.scalers, state["scalers"], strict=True):
            if scaler.is_enabled() and saved:
                scaler.load_state_dict(saved)
        rng = state["rng"]
        torch.set_rng_state(rng["torch"])
        if self.generator is not None and rng["run"].numel() == self.generator.get_state().numel():
            self.generator.set_state(rng["run"])
        if self.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], self.device)
        self.step = state["step"]
        if self.clock is not None:
            self.clock.fill_(self.step)

    def trained(self) -> list[tuple[Adam, Tensor]]:
        """Every parameter of both nets, with its optimiser."""
        return [
            (optimiser, p)
            for optimiser in (self.optG, self.optD)
            for group in optimiser.param_groups
            for p in group["params"]
        ]

    def tensors(self) -> list[Tensor]:
        """Every tensor that a step changes, gradients left out. Makes those that the optimisers and
        scalers would otherwise make in their first step."""
        found = [*_tensors(self.netG), *_tensors(self.netD)]
        for optimiser in (self.optG, self.optD):
            optimiser.prepare()
            for slots in optimiser.state.values():
                found += slots.values()
        for scaler in self.scalers:
            if scaler.is_enabled():
                scaler.scale(torch.zeros((), device=self.device))
                found += [t for t in (scaler._scale, scaler._growth_tracker) if t is not None]
        if self.ema is not None:
            found += [*_tensors(self.ema.average), self.ema.updates]
        if self.clock is not None:
            found.append(self.clock)
        return found

    def is_finite(self) -> bool:
        """Whether every parameter of both nets is finite. Waits for the device."""
        parameters = [*self.netG.parameters(), *self.netD.parameters()]
        norms = torch.stack(torch._foreach_norm([p.detach() for p in parameters]))
        return bool(norms.isfinite().all())


def _tensors(net: nn.Module) -> list[Tensor]:
    return [t.detach() for t in net.state_dict(keep_vars=True).values()]


def _adam(net: nn.Module, lr: float, config: TrainConfig, device: torch.device) -> Adam:
    betas = (config.beta1, config.beta2)
    options = _adam_options(device)
    return Adam(
        net.parameters(),
        lr=lr,
        betas=betas,
        eps=config.adam_eps,
        eps_inside=config.keras_epsilon,
        **options,
    )


def _adam_options(device: torch.device) -> dict[str, bool]:
    """PyTorch's fused Adam is one pass over memory, and on CUDA it keeps the fp16 overflow test on
    the device; a CUDA graph can hold it only if its step count is there, too."""
    return {"fused": device.type in ("cpu", "cuda"), "capturable": device.type == "cuda"}
