"""The only loops over batches: `train` and `predict`. A model runs where its parameters are.

Of several processes each has a share of every batch, and all have the result, which is one process's: processes.py.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from expunge.batches import Batch, Share, augment, inputs, loader_of, mix, real_labels, together
from expunge.convolutions import TinyMaps
from expunge.errors import DivergedError, InputError
from expunge.files import write_atomically
from expunge.journal import Journal, Meter
from expunge.processes import agreed, gathered, ranks
from expunge.randomness import seed_of, seeded
from expunge.recompute import recomputed
from expunge.schema import LayerMode, Precision, Predictions, Preprocessing, TrainConfig
from expunge.sharding import put_together, sharding, shards_of, share_out, whole

Objective = Callable[[Tensor, Batch], Tensor]
"""(logits (N, C), batch) -> scalar loss: the mean of what each sample adds, so that a batch may come in parts."""

PREDICT_BATCH = 256


def train(
    model: nn.Module,
    dataset: Dataset[Any],
    config: TrainConfig,
    *,
    seed: int,
    preprocessing: Preprocessing | None = None,
    synthetic: Dataset[Any] | None = None,
    objective: Objective | None = None,
    journal: Journal | None = None,
    phase: str = "train",
    checkpoint: Path | None = None,
    identity: str = "",
    refused: Collection[int] = (),
    until: Callable[[int], bool] | None = None,
    whole_batch: bool = False,
) -> None:
    """Train `model` in place, in train mode, and leave it in eval mode. Parameters without `requires_grad` stay.

    Args:
        dataset: (image, label) samples, or (image, label, target (C,)); images uint8, which `preprocessing` normalizes,
            or float.
        seed: of the order of samples, augmentation and dropout; the caller's random state is left alone.
        synthetic: images made from a model, shuffled in with `dataset`, shown as often, and not counted as read.
        objective: the loss; cross-entropy of logits and labels by default.
        checkpoint: a file in which each finished epoch is kept, and from which an interrupted training goes on, to
            the same result bit for bit on CPU. The caller removes it when the result is safe.
        identity: what else, besides config and seed, a checkpoint must agree in: which data, which model.
        refused: labels that no sample of `dataset` may bear; one that does stops the training before it is used.
        until: asked after each step with the number of steps done; the training ends where it says True. What it does
            to the model's mode and to the random state is undone. Several processes do as the first one's says.
        whole_batch: `objective` is no mean over samples, so that a batch cannot be divided among processes.

    Raises:
        DivergedError: the loss became NaN or infinite.
        InputError: there is nothing to train or to train on, a sample is refused, the checkpoint is of another
            training, or a batch that is needed whole would be divided.
    """
    device = device_of(model)
    check_float32(model)
    place = ranks()
    if whole_batch and place.size > 1:
        raise InputError(f"the loss of {phase} needs a batch whole: run this method in one process")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("expected a model with parameters to train: all of them have requires_grad=False")
    trained = shards_of(model) if sharding() else model
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    mixed = mix(dataset, synthetic, seed)
    loader = loader_of(mixed, config.batch_size, place, shuffle=True)
    if min(config.batch_size, len(mixed)) == 1 and _by_the_batch(model, config):
        raise InputError("a model with BatchNorm cannot train on batches of one image: give more images a batch")
    epochs = config.epochs if config.steps is None else math.ceil(config.steps / max(1, len(loader)))
    steps = config.steps or max(1, len(loader)) * epochs
    optimizer = _optimizer(parameters, config)
    scheduler = _scheduler(optimizer, config, steps)
    first_epoch = 0
    if checkpoint is not None:
        first_epoch = _restore(checkpoint, model, optimizer, scheduler, _fingerprint(config, seed, identity))
        if first_epoch != agreed(first_epoch):
            raise InputError(f"not every process sees the unfinished training in {checkpoint}: share the folder")
        if first_epoch and trained is not model:
            share_out(model, trained, optimizer)
    runner: nn.Module | None = None
    loss_of = objective or (lambda logits, batch: F.cross_entropy(logits, batch.labels))
    left = max(0, steps - first_epoch * len(loader))
    done = False
    layout = torch.contiguous_format

    anew = recomputed(trained) if config.gradient_checkpointing else nullcontext()
    # what is computed anew there would move the statistics a second time
    backward = partial(kept_statistics, trained) if config.gradient_checkpointing else nullcontext
    with anew, (journal or Journal()).phase(phase, steps=left) as meter:
        normalized = _by_the_batch(model, config)
        # of several processes, one alone cannot take its share in parts: the others speak to it in every layer
        parts = Parts(meter, 0 if whole_batch or place.size > 1 else 2 if normalized else 1)
        running = Statistics(trained)
        for epoch in range(first_epoch, epochs):
            meter.start_epoch()
            to_train(trained, config.mode)
            statistics = nullcontext() if config.update_norm_statistics else kept_statistics(trained)
            with seeded(seed_of(seed, epoch)), statistics:
                if hasattr(mixed, "set_epoch"):
                    mixed.set_epoch(epoch)
                for number, (pieces, share) in enumerate(loader):
                    if meter.steps == left or done:
                        break
                    if share.size == 1 and normalized:  # what else it came with could not be decoded
                        continue
                    real = real_labels(pieces, share)
                    if not real.keys().isdisjoint(refused):
                        raise InputError(
                            f"a retained sample bears the forgotten label {min(real.keys() & set(refused))}"
                        )
                    batch = inputs(pieces, preprocessing, device)
                    batch = replace(batch, images=augment(batch.images, config, share))
                    if runner is None:
                        layout = fastest_layout(model, batch.images)
                        meter.precision = precision_for(config.precision, model, batch.images)
                        runner = _shared(model, batch.images) if trained is model else trained
                    run = partial(answer, runner, precision=meter.precision, recomputes=config.gradient_checkpointing)
                    learn = partial(_learn, run, loss_of, share, layout, backward, batch)
                    running.keep()
                    with share.drawing(seed, epoch, number), share.statistics():
                        value, correct = parts.add_up(len(batch.labels), learn, optimizer.zero_grad, running)
                    if not math.isfinite(value):
                        raise DivergedError(
                            f"the loss became {value} at step {meter.steps + 1} of {phase}; nothing was kept: "
                            f"lower the learning rate (now {config.lr:g})"
                        )
                    if config.clip_value is not None:
                        nn.utils.clip_grad_value_(parameters, config.clip_value)
                    optimizer.step()
                    scheduler.step()
                    meter.step(loss=value, samples=share.size, correct=correct)
                    meter.read(real)
                    if until is not None:
                        if trained is not model:
                            put_together(trained, model)
                        with evaluating(model), seeded(0):
                            done = agreed(until(meter.steps))
            if done:
                break
            if checkpoint is not None:
                fingerprint = _fingerprint(config, seed, identity)
                _save_checkpoint(checkpoint, trained, optimizer, scheduler, fingerprint, epoch + 1)
        meter.labels = sum(gathered(meter.labels), Counter())
    if meter.steps == 0 and left:
        raise InputError("expected samples to train on, got none")
    if trained is not model:
        put_together(trained, model)
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise DivergedError(
            f"the weights became NaN or infinite in the last step of {phase}; nothing was kept: "
            f"lower the learning rate (now {config.lr:g})"
        )
    model.zero_grad()
    model.eval()


def _learn(
    run: Callable[[Tensor], Tensor],
    loss_of: Objective,
    share: Share,
    layout: torch.memory_format,
    backward: Callable[[], AbstractContextManager[None]],
    batch: Batch,
    rows: slice,
) -> tuple[float, int]:
    """Add the gradients of some rows of a batch to what is there; return their part of the loss, and right answers.

    Of several processes what is returned is of the whole batch.
    """
    part = batch if rows == slice(0, len(batch.labels)) else batch.part(rows)
    logits = run(part.images.contiguous(memory_format=layout))
    weight = len(part.labels) / len(batch.labels)
    loss = loss_of(logits, part) if part is batch else weight * loss_of(logits, part)
    correct = int((logits.detach().argmax(1) == part.labels).sum())
    # of several processes (whose batch is one part) before the backward pass, where they wait for each other:
    # all go into it, or none
    value, correct = share.summed(loss.item(), correct)
    if math.isfinite(value):
        with backward():
            torch.autograd.backward(share.weighed(loss))
    return value, correct


@torch.no_grad()
def predict(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    preprocessing: Preprocessing | None = None,
    batch_size: int = PREDICT_BATCH,
    precision: Precision = "fp32",
    journal: Journal | None = None,
    phase: str = "predict",
) -> Predictions:
    """Return the logits of `model`, in eval mode, on every sample of `dataset`, in its order; changes nothing.

    Args:
        precision: of the sums within the model; "fp32" for every measure.

    Raises:
        InputError: the data set is empty.
    """
    device = device_of(model)
    check_float32(model)
    loader = loader_of(mix(dataset, None, 0), batch_size, ranks(), shuffle=False)
    logits, labels = _Rows(), _Rows()
    sizes: list[int] = []
    layout = torch.channels_last
    with evaluating(model), seeded(0), (journal or Journal()).phase(phase, steps=len(loader)) as meter:
        parts = Parts(meter)
        for pieces, share in loader:
            batch = inputs(pieces, preprocessing, device)
            if not sizes:
                meter.precision = precision_for(precision, model, batch.images)
            try:
                answers = parts.answers(model, batch.images.contiguous(memory_format=layout), meter.precision)
            except RuntimeError:  # as `fastest_layout` says; what is wrong in itself is so again
                layout = torch.contiguous_format
                answers = parts.answers(model, batch.images.contiguous(), meter.precision)
            logits.add(answers[: share.count].float())
            labels.add(batch.labels[: share.count])
            sizes.append(share.size)
            meter.step(samples=share.size)
            meter.read(real_labels(pieces, share))
        meter.labels = sum(gathered(meter.labels), Counter())
    if not sizes:
        raise InputError("expected samples to predict, got none")
    return Predictions(together([logits.all], sizes), together([labels.all], sizes))


class _Rows:
    """Rows that are collected on the CPU, in one piece of memory.

    A small piece kept of each batch lies where the batch was, so that the next cannot lie there again: with glibc,
    27,000 images of 64 x 64 took 1.1 GB more that way, nearly all of them as float.
    """

    def __init__(self) -> None:
        self.held: Tensor | None = None
        self.count = 0

    def add(self, rows: Tensor) -> None:
        end = self.count + len(rows)
        if self.held is None:
            self.held = torch.empty((max(1024, end), *rows.shape[1:]), dtype=rows.dtype)
        if end > len(self.held):
            self.held = torch.cat([self.held, torch.empty_like(self.held), rows.cpu()])
        self.held[self.count : end] = rows
        self.count = end

    @property
    def all(self) -> Tensor:
        assert self.held is not None  # something was added
        return self.held[: self.count].clone()


# Models


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter (the CPU for a model without any)."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def logits_of(output: Any) -> Tensor:
    """Return the (N, C) logits in a model's output: the tensor itself, or its `.logits` (transformers, GoogLeNet).

    Raises:
        InputError: there are none.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        came = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
        raise InputError(f"expected the model to return logits (images, classes), got {came}")
    return logits


def answer(model: nn.Module, images: Tensor, precision: Precision = "fp32", *, recomputes: bool = False) -> Tensor:
    """Return the logits (N, C), float32, of `model` on images (N, channels, H, W): the one way in which models are run.

    Args:
        precision: "bf16" runs it under torch's autocast; measures are always taken in "fp32".
        recomputes: activations are computed anew in the backward pass, which knows nothing of how they were before.
    """
    kind = images.device.type
    # on a GPU these products would be many small kernels
    with TinyMaps() if kind == "cpu" and not recomputes else nullcontext():
        if precision != "bf16":
            return logits_of(model(images))
        with torch.autocast(kind, torch.bfloat16):
            return logits_of(model(images)).float()


def precision_for(asked: Precision, model: nn.Module, images: Tensor) -> Precision:
    """Return "fp32" or "bf16": what was `asked` for, or with "auto" what trains faster.

    bf16 is faster where the device multiplies in it: on a GPU, and on a CPU with AMX or AVX-512 BF16 for networks whose
    work lies in dense convolutions; attention and grouped convolutions are slower in it there (docs/performance.md).
    The model and the device alone decide, no clock, so that a run can be repeated bit for bit.
    """
    if asked != "auto":
        return asked
    if images.is_cuda:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has = torch.cpu.get_capabilities()
    fast = images.device.type == "cpu" and (has.get("amx_bf16", False) or has.get("avx512_bf16", False))
    return "bf16" if fast and _is_dense_convolutional(model, images[:1]) else "fp32"


@torch.no_grad()
def _is_dense_convolutional(model: nn.Module, image: Tensor) -> bool:
    """Return whether nearly all multiplications of `model` are those of convolutions that are not grouped."""
    if any(getattr(module, "groups", 1) != 1 for module in model.modules()):
        return False
    counter = FlopCounterMode(display=False)
    with counter, evaluating(model):
        model(image.detach())
    counts = counter.get_flop_counts().get("Global", {})
    convolved = sum(count for kind, count in counts.items() if "convolution" in str(kind))
    return convolved > 0.9 * sum(counts.values())


def check_float32(model: nn.Module) -> None:
    """Raise InputError unless all floating parameters are float32: images come as float32."""
    other = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
    if other is not None:
        raise InputError(f"expected a float32 model, got parameters of {other}: call model.float() on a copy")


def check_plain(model: nn.Module) -> None:
    """Raise InputError of a model that copies of which cannot be changed as it could itself."""
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "expected a Python module, got TorchScript, which cannot be copied: hand in what it was made of"
        )
    if hasattr(model, "_orig_mod"):
        raise InputError("expected a model that is not compiled: hand in its _orig_mod, and compile what comes out")


def fastest_layout(model: nn.Module, images: Tensor) -> torch.memory_format:
    """Return channels_last, in which convolutions train a fifth faster here, and bring `model` into it.

    A model that views its feature maps as contiguous memory cannot run in it: then contiguous, and it stays as it is.
    """
    probe = images[:1].contiguous(memory_format=torch.channels_last)
    trial = copy.deepcopy(model).to(memory_format=torch.channels_last)
    try:
        with torch.no_grad(), evaluating(trial):
            trial(probe)
    except RuntimeError:
        return torch.contiguous_format
    model.to(memory_format=torch.channels_last)
    return torch.channels_last


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode, and each of its modules back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def to_train(model: nn.Module, mode: LayerMode) -> None:
    """Put `model` into train mode; with batch, only what normalizes by its batch; with eval, only what must be."""
    for module in model.modules():
        # without train mode cuDNN's recurrent layers have no backward pass, and transformers keeps all activations
        needed = isinstance(module, nn.RNNBase) or getattr(module, "gradient_checkpointing", False)
        by_batch = has_running_statistics(module)
        # a layer that was frozen stays as it is, its statistics too
        wanted = mode == "train" or (mode == "batch" and by_batch)
        module.training = (wanted and not (by_batch and _is_frozen(module))) or bool(needed)


def _by_the_batch(model: nn.Module, config: TrainConfig) -> bool:
    """Return whether layers normalize by the batch, so that what an image gives depends on the others in it."""
    return config.mode != "eval" and normalizes_by_the_batch(model)


def has_running_statistics(module: nn.Module) -> bool:
    """Return whether a module keeps statistics of its inputs in train mode (BatchNorm and its kin).

    A FrozenBatchNorm, of torchvision or timm, has such statistics too, and nothing to move them with.
    """
    return getattr(module, "running_mean", None) is not None and hasattr(module, "momentum")


def normalizes_by_the_batch(model: nn.Module) -> bool:
    """Return whether a layer of a model in train mode moves its statistics, and what is one image's hangs on others."""
    return any(has_running_statistics(module) and not _is_frozen(module) for module in model.modules())


def _is_frozen(module: nn.Module) -> bool:
    """Return whether a layer has parameters of its own, and none is to be trained."""
    own = list(module.parameters(recurse=False))
    return bool(own) and not any(parameter.requires_grad for parameter in own)


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of normalization layers as they are, whatever batches go through in train mode.

    The layers still normalize by the statistics of the batch, which trains more stably than eval mode.
    """
    layers = [module for module in model.modules() if has_running_statistics(module)]
    kept = [{name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)} for layer in layers]
    try:
        yield
    finally:
        for layer, buffers in zip(layers, kept, strict=True):
            for name, buffer in layer.named_buffers(recurse=False):
                buffer.copy_(buffers[name])


class _Answering(nn.Module):
    """A model that returns its logits alone: whatever else it gives, no gradient comes back from."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


def _shared(model: nn.Module, images: Tensor) -> nn.Module:
    """Return `model`, or what runs it so that gradients are the mean over all processes."""
    if ranks().size == 1:
        return model
    idle = _has_idle_parameters(model, images[:1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        # statistics are the same everywhere already
        return DistributedDataParallel(_Answering(model), broadcast_buffers=False, find_unused_parameters=idle)


def _has_idle_parameters(model: nn.Module, images: Tensor) -> bool:
    """Return whether some parameters that are trained do not act on the logits."""
    trial = copy.deepcopy(model).eval()
    trained = [parameter for parameter in trial.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        found = torch.autograd.grad(logits_of(trial(images)).sum(), trained, allow_unused=True)
    return any(gradient is None for gradient in found)


# Memory


class Parts:
    """How many images go through a model at once: a whole batch, until memory runs short; then half, and half again.

    In eval mode the result is the same. In train mode gradients add up to those of the batch, but BatchNorm normalizes
    each part by its own statistics; running statistics move as far as with the whole batch.

    Args:
        meter: of the phase, which is told.
        least: images a part; 0: batches cannot be divided.
    """

    def __init__(self, meter: Meter, least: int = 1) -> None:
        self.meter = meter
        self.least = least
        self.most: int | None = None  # images at once; None: a whole batch

    def limit(self, count: int, most: int) -> None:
        """Let no more than `most` images of a batch go through at once: as many as memory was found to hold."""
        if self.least and most < count:
            self.most = max(most, self.least)
            self.meter.note = f"memory is free for {most} images at once, of batches of {count}"

    def of(self, count: int) -> list[slice]:
        """Return the rows of each part of a batch, of even lengths."""
        number = 1 if self.most is None else max(1, min(-(-count // self.most), count // self.least))
        bounds = [count * index // number for index in range(number + 1)]
        return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]

    def add_up(
        self,
        count: int,
        learn: Callable[[slice], tuple[float, int]],
        begin: Callable[[], object],
        statistics: Statistics | None = None,
    ) -> tuple[float, int]:
        """Return the sums of what `learn` gives for each part, begun anew with smaller ones where memory runs short."""
        while True:
            rows = self.of(count)
            begin()
            try:
                with statistics.slowed(len(rows)) if statistics is not None else nullcontext():
                    done = [learn(part) for part in rows]
                return sum(loss for loss, _ in done), sum(correct for _, correct in done)
            except RuntimeError as error:
                self._halve(count, error)
            clear_device_cache(garbage_collection=True)  # only now, when the error holds nothing any more
            if statistics is not None:
                statistics.restore()

    def answers(self, model: nn.Module, images: Tensor, precision: Precision = "fp32") -> Tensor:
        """Return the logits of `model`, in eval mode, on images of its device."""
        while True:
            try:
                return torch.cat([answer(model, images[rows], precision) for rows in self.of(len(images))])
            except RuntimeError as error:
                self._halve(len(images), error)
            clear_device_cache(garbage_collection=True)

    def _halve(self, count: int, error: RuntimeError) -> None:
        """Ask for smaller parts, or raise `error` again where it is another, or none can be smaller."""
        longest = max(rows.stop - rows.start for rows in self.of(count))
        if self.least == 0 or longest // 2 < self.least or not is_out_of_memory(error):
            raise error
        self.most = longest // 2
        trained = "; BatchNorm normalized each part by itself" if self.least == 2 else ""
        self.meter.note = (
            f"memory ran short, so batches of {count} went through the model {self.most} at a time{trained}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, of a GPU or of the machine."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and should_reduce_batch_size(error)
    )


class Statistics:
    """The running statistics of a model's normalization layers: kept before a step that may have to be done again."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if has_running_statistics(module)]
        self.live = [buffer for layer in self.layers for buffer in layer.buffers(recurse=False)]
        self.kept = [buffer.clone() for buffer in self.live]

    def keep(self) -> None:
        if self.live:
            torch._foreach_copy_(self.kept, self.live)

    def restore(self) -> None:
        if self.live:
            torch._foreach_copy_(self.live, self.kept)

    @contextmanager
    def slowed(self, parts: int) -> Iterator[None]:
        """Have running statistics move as far in so many parts of a batch as they would with the whole of it."""
        before = [(layer, layer.momentum) for layer in self.layers if isinstance(layer.momentum, float)]
        for layer, momentum in before if parts > 1 else ():
            layer.momentum = 1 - (1 - momentum) ** (1 / parts)
        try:
            yield
        finally:
            for layer, momentum in before:
                layer.momentum = momentum


# Optimizer, schedule, checkpoint


def _optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=config.momentum > 0
        )
    maker = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    # one pass over the weights instead of a dozen: on CPU half the time
    return maker(parameters, config.lr, weight_decay=config.weight_decay, fused=True)


def _scheduler(optimizer: Optimizer, config: TrainConfig, steps: int) -> LRScheduler:
    if config.schedule == "one_cycle":
        return OneCycleLR(optimizer, config.lr, total_steps=steps + 1)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def _fingerprint(config: TrainConfig, seed: int, identity: str) -> str:
    return f"{config!r} seed={seed} {identity}"


def _save_checkpoint(
    path: Path, model: nn.Module, optimizer: Any, scheduler: Any, fingerprint: str, epoch: int
) -> None:
    state = {
        "model": whole(model.state_dict()),
        "optimizer": whole(optimizer.state_dict()),
        "scheduler": scheduler.state_dict(),
        "fingerprint": fingerprint,
        "epoch": epoch,
    }
    if not ranks().first:
        return
    write_atomically({path: lambda beside: torch.save(state, beside)})


def _restore(path: Path, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, fingerprint: str) -> int:
    """Load the last finished epoch into the arguments; return how many epochs are done (0 without a checkpoint)."""
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location=device_of(model), weights_only=True)
        same = state["fingerprint"] == fingerprint and {k: v.shape for k, v in state["model"].items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise InputError(f"cannot read the unfinished training in {path}: delete it to start anew") from error
    if not same:
        raise InputError(
            f"{path} holds an unfinished training with other settings: repeat those to resume it, or delete it to start"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return int(state["epoch"])
