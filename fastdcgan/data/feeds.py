"""Batches of training images on the device: which images, cropped where, flipped or not, as numbers
from -1 to 1. Not here: how images become the packed array (cache.py)."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdcgan.data.cache import Packed
from fastdcgan_kernels.functional import runs_kernels

PREFETCH = 3  # batches that a StreamFeed reads ahead


class Order:
    """Which images make which batch: a pure function of (seed, step), so there is no state to save.

    An epoch takes every image once, in an order of its own; where it is longer than the number of
    images, every image again in another order, and so on.
    """

    def __init__(self, n: int, epoch_images: int, batch: int, seed: int) -> None:
        """
        Args:
            n: images there are.
            epoch_images: images in an epoch; the last batch of an epoch has what is left.
            batch: images in a batch, over all ranks together.
            seed: any integer.
        """
        if min(n, epoch_images, batch) < 1:
            raise ValueError(
                f"n, epoch_images and batch must be positive, not {n}, {epoch_images}, {batch}"
            )
        self.n, self.epoch_images, self.batch, self.seed = n, epoch_images, batch, seed
        self.steps_per_epoch = -(-epoch_images // batch)
        self._shuffled: tuple[int, Tensor] | None = None

    def epoch(self, step: int) -> int:
        """The 0-based epoch of a 0-based step."""
        return step // self.steps_per_epoch

    def batch_size(self, step: int) -> int:
        """Images in the step's batch, over all ranks together."""
        return min(self.batch, self.epoch_images - self.batch * (step % self.steps_per_epoch))

    def shuffled(self, epoch: int) -> Tensor:
        """The epoch's images in their order: int64 on the CPU, of shape (epoch_images,). Do not
        write to it."""
        held = self._shuffled  # read once: a thread may ask for another epoch meanwhile
        if held is None or held[0] != epoch:
            # hashed, so that neighbouring seeds and epochs have nothing in common
            entropy = np.random.SeedSequence([self.seed % 2**64, epoch])
            generator = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
            rounds = -(-self.epoch_images // self.n)
            order = torch.cat([torch.randperm(self.n, generator=generator) for _ in range(rounds)])
            held = self._shuffled = (epoch, order[: self.epoch_images])
        return held[1]

    def indices(self, step: int) -> Tensor:
        """The images of the step's batch, over all ranks together: int64 on the CPU, of shape
        (batch_size(step),)."""
        start = self.batch * (step % self.steps_per_epoch)
        return self.shuffled(self.epoch(step))[start : start + self.batch]


def cut(
    images: Tensor, rows: Tensor, y: Tensor | None, x: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Pixels y (b, H) and x (b, W) of these rows (b,) of uint8 images (n, h, w, C), or all pixels,
    as value / 127.5 - 1: (b, C, H, W) in channels_last."""
    if y is None or x is None:
        pixels = images.index_select(0, rows)
    else:
        pixels = images[rows[:, None, None], y[:, :, None], x[:, None, :]]
    exact = torch.promote_types(dtype, torch.float32)
    values = pixels.to(exact).div(127.5).sub(1).to(dtype)
    return values.permute(0, 3, 1, 2)


class Feed(ABC):
    """Batches on the device. Made by `make_feed`; `close()` it, or use it in a `with`."""

    resident: bool
    """Whether `rows` gives the same images at the same place for every step."""

    def __init__(
        self,
        packed: Packed,
        order: Order,
        device: torch.device,
        rank: int,
        world: int,
        hflip: bool,
        dtype: torch.dtype,
        labels: Tensor | None = None,
    ) -> None:
        self.order, self.device = order, device
        self._size, self._margin = packed.size, packed.window - packed.size
        self._rank, self._world, self._hflip, self._dtype = rank, world, hflip, dtype
        self._ramp = torch.arange(self._size, device=device)
        self._labels = None if labels is None else labels.to(device)
        self._uploaded: tuple[int, Tensor] | None = None

    def batch(self, step: int, generator: torch.Generator | None = None) -> Tensor:
        """This rank's images of a step; nothing in it waits for the device.

        Args:
            step: 0-based; batches come fastest in the order of their steps.
            generator: of the feed's device, for crops and flips; None: the device's default one.
                All ranks draw for the whole batch: give them generators in the same state, and
                together they see what one rank alone would see.

        Returns:
            A tensor of shape (b, C, size, size) in channels_last, of the feed's dtype, on its
            device: value / 127.5 - 1 of the uint8 values.
        """
        images, rows = self.rows(step)
        return self.assemble(images, rows, self.order.batch_size(step), generator)

    def assemble(
        self,
        images: Tensor,
        rows: Tensor,
        whole: int,
        generator: torch.Generator | None = None,
        cut: Callable[..., Tensor] = cut,
    ) -> Tensor:
        """The batch made of these `rows` of `images`, as `rows` gives them: cropped, flipped, from
        -1 to 1. It is device work alone, so a CUDA graph can hold it.

        Args:
            whole: images in the batch of all ranks together.
            generator: as in `batch`.
            cut: the function `cut`, or that compiled.
        """
        mine = self._part(whole)
        if runs_kernels(self.device) and self._dtype.itemsize <= 4:
            return self._crop(images, rows, whole, mine, generator)
        y = x = None
        if self._margin or self._hflip:
            y = x = self._ramp.expand(len(rows), -1)
            if self._hflip:
                flipped = self._draw(2, whole, mine, generator).bool()
                x = torch.where(flipped, x.flip(1), x)
            if self._margin:
                y = y + self._draw(self._margin + 1, whole, mine, generator)
                x = x + self._draw(self._margin + 1, whole, mine, generator)
        return cut(images, rows, y, x, self._dtype)

    def _crop(
        self, images: Tensor, rows: Tensor, whole: int, mine: slice,
        generator: torch.Generator | None,
    ) -> Tensor:  # fmt: skip
        """What `assemble` makes elsewhere by `cut`, in one launch: the same draws and bits."""
        flipped = corner = None
        if self._hflip:
            flipped = self._draw(2, whole, mine, generator)
        if self._margin:
            corner = [self._draw(self._margin + 1, whole, mine, generator) for _ in range(2)]
        from fastdcgan_kernels.gpu.crop import squares  # imports Triton

        return squares(images, rows, self._size, self._dtype, corner=corner, flipped=flipped)

    def rows(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (·, window, window, C) uint8 and which rows of them are this rank's batch (int64),
        both on the device; `assemble` makes the batch of them."""
        return self._rows(step, self._part(self.order.batch_size(step)))

    def labels(self, step: int) -> Tensor | None:
        """The class of each image of this rank's batch, (b,) int64 on the device; None where the
        feed was given no labels. Nothing in it waits for the device."""
        if self._labels is None:
            return None
        mine = self._part(self.order.batch_size(step))
        return self._labels.index_select(0, self._indices(step, mine))

    def _indices(self, step: int, mine: slice) -> Tensor:
        """`Order.indices` of this rank's batch, on the device."""
        order = self.order
        epoch = order.epoch(step)
        if self._uploaded is None or self._uploaded[0] != epoch:
            shuffled = order.shuffled(epoch)
            if self.device.type == "cuda":
                shuffled = shuffled.pin_memory()  # else the upload would wait for the device
            self._uploaded = (epoch, shuffled.to(self.device, non_blocking=True))
        start = order.batch * (step % order.steps_per_epoch)
        return self._uploaded[1][start:][mine]

    def _draw(
        self, bound: int, whole: int, mine: slice, generator: torch.Generator | None
    ) -> Tensor:
        """Integers below `bound`, drawn for the whole batch; this rank's, of shape (b, 1)."""
        drawn = torch.randint(bound, (whole, 1), generator=generator, device=self.device)
        return drawn[mine]

    def _part(self, whole: int) -> slice:
        """This rank's rows of a batch, as torch.tensor_split deals them out."""
        share, more = divmod(whole, self._world)
        start = self._rank * share + min(self._rank, more)
        return slice(start, start + share + (self._rank < more))

    @abstractmethod
    def _rows(self, step: int, mine: slice) -> tuple[Tensor, Tensor]:
        """Images (·, window, window, C) uint8 and which rows of them are this rank's batch, both on
        the device."""

    def close(self) -> None:  # noqa: B027 - most feeds have nothing to end
        """Ends the feed's thread, if it has one. It gives no batches after that."""

    def __enter__(self) -> "Feed":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class ResidentFeed(Feed):
    """All images lie on the device; on the CPU they stay in the mapped file."""

    resident = True

    def __init__(self, packed: Packed, **options: Any) -> None:
        super().__init__(packed, **options)
        self._images = torch.from_numpy(packed.images).to(self.device)

    def _rows(self, step: int, mine: slice) -> tuple[Tensor, Tensor]:
        return self._images, self._indices(step, mine)


class StreamFeed(Feed):
    """Images stay in the mapped file: a thread reads the rows of the next batches, which are then
    copied to the device. Gives the very batches that a ResidentFeed gives."""

    resident = False

    def __init__(self, packed: Packed, **options: Any) -> None:
        super().__init__(packed, **options)
        self._file = torch.from_numpy(packed.images)
        self._thread = ThreadPoolExecutor(1, "fastdcgan-feed")
        self._ahead = deque[tuple[int, Future[Tensor]]]()

    def _rows(self, step: int, mine: slice) -> tuple[Tensor, Tensor]:
        if self._ahead and self._ahead[0][0] != step:  # a jump, as when a run is continued
            for _, reading in self._ahead:
                reading.cancel()
            self._ahead.clear()
        for later in range(step + len(self._ahead), step + 1 + PREFETCH):
            self._ahead.append((later, self._thread.submit(self._read, later)))
        images = self._ahead.popleft()[1].result().to(self.device, non_blocking=True)
        return images, torch.arange(len(images), device=self.device)

    def _read(self, step: int) -> Tensor:
        mine = self._part(self.order.batch_size(step))
        rows = self.order.indices(step)[mine]
        # Not a ring of buffers: PyTorch keeps freed pinned memory for the next one, and gives it
        # out only when the copy from it is done.
        buffer = torch.empty(
            (len(rows), *self._file.shape[1:]),
            dtype=torch.uint8,
            pin_memory=self.device.type == "cuda",
        )
        return torch.index_select(self._file, 0, rows, out=buffer)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


def make_feed(
    packed: Packed,
    *,
    order: Order,
    device: torch.device | str,
    rank: int = 0,
    world: int = 1,
    hflip: bool,
    dtype: torch.dtype = torch.float32,
    resident: bool | None = None,
    labels: np.ndarray[Any, np.dtype[np.int64]] | None = None,
) -> Feed:
    """A feed of the packed images.

    Args:
        packed: see `prepare`.
        order: which images make which batch; its n must be that of `packed`.
        device: where batches are wanted; on "meta" they have shapes only.
        rank: this process, 0 <= rank < world; it gets its part of each batch.
        world: processes that share a batch.
        hflip: flip half of the images, drawn at random, from left to right.
        dtype: floating, of the batches. They are computed in float32 or better and rounded once.
        resident: keep all images on the device; None: unless the device is a GPU where they would
            take more than 40 % of the memory that is free.
        labels: (packed.n,), the class of each image, for `Feed.labels`. They are kept on the device
            in any case.

    Raises:
        ValueError: where the order or the labels are not those of these images, or the rank is none
            of the world's.
    """
    if labels is not None and len(labels) != packed.n:
        raise ValueError(f"{len(labels)} labels for {packed.n} packed images")
    if order.n != packed.n:
        raise ValueError(f"an order of {order.n} images for {packed.n} packed ones")
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of a world of {world}")
    device = torch.device(device)
    if resident is None:
        resident = True
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            resident = packed.nbytes <= 0.4 * free
    kind = ResidentFeed if resident else StreamFeed
    return kind(
        packed, order=order, device=device, rank=rank, world=world, hflip=hflip, dtype=dtype,
        labels=None if labels is None else torch.from_numpy(labels),
    )  # fmt: skip
