"""Which layers belong to one adapter of one model, in model order: what the step rules act on.

Layers hold their roster and a roster holds its layers weakly, so that a model is freed as soon as it is dropped. A
copied or unpickled model gets rosters of its own: a roster travels empty and its layers enrol as they arrive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch.distributed as dist
from torch import Tensor, nn

from rankwise.adapters.peers import is_sharded, peers_of
from rankwise.adapters.progress import Progress, unfinished
from rankwise.adapters.together import Together
from rankwise.methods.base import Method

if TYPE_CHECKING:
    from rankwise.adapters.layer import AdapterLayer

_ROSTERS: list[weakref.ref[Roster]] = []
"""The rosters in the process, oldest first. Each takes itself out when it is freed, so that nobody rewrites the list,
which other threads may be adding to."""


class Roster:
    """The adapted layers of one adapter of one model.

    Args:
        adapter: the adapter's name.
        method: its config, which is its method.
    """

    on_forward: ClassVar[Callable[[Roster, AdapterLayer, Tensor], None] | None] = None
    """What `training` wants to see of one layer's training forwards: (roster, layer, output)."""

    def __init__(self, adapter: str, method: Method) -> None:
        self.adapter = adapter
        self.method = method
        self.trainer_total: int | None = None
        self.trainer_epoch: int | None = None
        self.development: Callable[[], list[Any]] | None = None  # gives batches of a trainer's data to score ranks on
        self.in_trainer = False  # a trainer's own checkpoints are no sign that a run has ended
        self.together = Together(adapter, method)
        self.session: Any = None
        self.peers: Any = None  # the processes that train it together
        self.sharded = False  # by FSDP2
        self.in_ddp = False  # DDP was told not to send its buffers
        self._layers: list[weakref.ref[AdapterLayer]] = []
        self._watched: weakref.ref[AdapterLayer] | None = None  # the first layer that trains
        self._model: weakref.ref[nn.Module] | None = None
        _ROSTERS.append(weakref.ref(self, _ROSTERS.remove))

    def enrol(self, layer: AdapterLayer) -> None:
        """Add a layer; layers come in model order."""
        self._layers.append(weakref.ref(layer))

    def attach(self, model: nn.Module) -> None:
        """Remember the model whose layers these are, weakly."""
        self._model = weakref.ref(model)

    @property
    def model(self) -> nn.Module | None:
        """The model whose layers these are: what is run where ranks are scored between steps."""
        return None if self._model is None else self._model()

    @property
    def layers(self) -> list[AdapterLayer]:
        """The living layers that still carry this adapter, in model order."""
        found = (reference() for reference in self._layers)
        return [layer for layer in found if layer is not None and layer.rosters.get(self.adapter) is self]

    def parameters(self) -> Iterator[nn.Parameter]:
        """What trains of the adapter, layer by layer."""
        return (p for layer in self.layers for p in layer.tensors(self.adapter).trained())

    def meet(self, layer: AdapterLayer) -> None:
        """Find out, when the first layer runs in training, which processes train this adapter together."""
        if not (dist.is_available() and dist.is_initialized()):
            self.peers, self.sharded = None, False
        elif self.peers is None and self._layers and self._layers[0]() is layer:
            self.sharded = is_sharded(self.model)
            self.join(peers_of(self.model))

    def join(self, peers: Any) -> None:
        """Train together with a group of processes from now on: buffers start as the first one's do.

        The same rules then keep them equal, so that DDP need not send them with every forward pass.
        """
        self.peers = peers
        if peers is not None:
            for layer in self.layers:
                layer.tensors(self.adapter).share(peers)

    def saw_forward(self, layer: AdapterLayer, output: Tensor) -> None:
        """A layer ran forward in training; pass it on if it is the first that trains."""
        if Roster.on_forward is None:
            return
        if self._layers and self._layers[0]() is layer:
            self._watched = next((weakref.ref(each) for each in self.layers if self._trains(each)), None)
        if self._watched is not None and self._watched() is layer:
            Roster.on_forward(self, layer, output)

    def _trains(self, layer: AdapterLayer) -> bool:
        return any(p.requires_grad for p in layer.tensors(self.adapter).trained())

    def catch_up(self) -> None:
        """Before somebody reads or saves the counters: `training` may not have asked the device for the last step's."""
        if self.session is not None:
            self.session.learn()

    def unfinished(self) -> str | None:
        """A sentence about ranks short of their budget, if training has begun; see `progress.unfinished`.

        Of shards it tells no ranks: to gather them takes every process, and one alone may be saving.
        """
        self.catch_up()
        layers = self.layers
        progress = Progress.of(layers[0].tensors(self.adapter).progress)
        if not progress.step:
            return None
        counted = [] if self.sharded else layers
        return unfinished(self.method, progress, (int(layer.kept(self.adapter).sum()) for layer in counted))

    def __reduce__(self) -> tuple[type[Roster], tuple[str, Method]]:
        return Roster, (self.adapter, self.method)


def living_rosters() -> list[Roster]:
    """Every roster in the process, oldest first."""
    references = list(_ROSTERS)  # a copy: the list may change while it is read
    return [roster for reference in references if (roster := reference()) is not None]
