"""What a call on a GPU takes of the host before the driver has its launches. There need not be a GPU: tensors of the
host stand in for those of one, and a driver that does nothing for CUDA's."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import nbbn
from benchmarks.timing import Effort, Sample, measure
from nbbn.arrays import availability
from nbbn.engine.dispatcher import Dispatcher

SHAPE = 32, 64
# As a bound step runs: in one launch, as this shape does by itself, or in two, as large inputs do.
FORMS: dict[str, bool | None] = {"one launch": None, "two launches": False}


class Driver:
    """Counts what it is asked for, and does nothing."""

    CUfunction = int

    def __init__(self) -> None:
        self.launches = self.clears = self.switches = 0

    def cuCtxGetCurrent(self) -> tuple[int, int]:
        return 0, 1

    def cuCtxSetCurrent(self, context: int) -> tuple[int]:
        self.switches += 1
        return (0,)

    def cuDeviceGet(self, ordinal: int) -> tuple[int, int]:
        return 0, ordinal

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[int, int]:
        return 0, 1

    def cuMemsetD8Async(self, address: int, value: int, size: int, stream: int) -> tuple[int]:
        self.clears += 1
        return (0,)

    def cuLaunchKernel(self, *arguments: Any) -> tuple[int]:
        self.launches += 1
        return (0,)


@contextmanager
def without_gpu() -> Iterator[Driver]:
    """Inside, PyTorch's tensors of the host are taken for a GPU's. Nothing is compiled, and nothing computed.

    Raises: RuntimeError where PyTorch or numba-cuda is not installed.
    """
    try:
        torch: Any = importlib.import_module("torch")
        repeated = importlib.import_module("nbbn.engine.cuda.launching")
        launching, driver = (importlib.import_module(f"nbbn.streams.{name}") for name in ("launching", "driver"))
    except ImportError as error:
        raise RuntimeError(
            f'python -m benchmarks cuda --host needs PyTorch and numba-cuda, of any build: pip install "nbbn[cuda]" '
            f"torch ({error})"
        ) from None
    adapter: Any = importlib.import_module("nbbn.arrays.torch")
    found, host = Driver(), torch.device("cpu")
    with ExitStack() as stack:
        for module, name, stand_in in (
            (availability, "require", lambda *what: None),
            (adapter, "is_device_array", lambda value: isinstance(value, torch.Tensor)),
            (adapter, "is_host_array", lambda value: False),
            (adapter, "stream", lambda device: 0),
            (adapter, "_device", lambda number: host),
            (driver, "driver", lambda: found),
            (launching, "driver", lambda: found),
            (launching, "function", lambda *kernel: 1),
            (repeated, "function", lambda *kernel: 1),
        ):
            stack.enter_context(patch.object(module, name, stand_in))
        driver._primary.cache_clear()
        try:
            yield found
        finally:
            driver._primary.cache_clear()


def calls(one_pass: bool | None) -> dict[str, Callable[[], Any]]:
    """The calls by name, inside without_gpu(). Each has been made before."""
    torch: Any = importlib.import_module("torch")
    x, dy, layer = torch.zeros(SHAPE), torch.zeros(SHAPE), nbbn.BatchNormalization()
    nbbn.force(layer, one_pass=one_pass)
    layer(x)
    _, pullback = layer.vjp(x, training=True)
    pullback(dy)
    return {
        "layer(x)": lambda: layer(x),
        "layer(x, training=True)": lambda: layer(x, training=True),
        "layer.vjp(x, training=True)": lambda: layer.vjp(x, training=True),
        "pullback(dy)": lambda: pullback(dy),
    }


def run(quick: bool) -> dict[str, dict[str, Sample]]:
    """Seconds per call, by the form of a step and the call; in the end those of steps that are not bound."""
    effort = Effort(rounds=9 if quick else 25, seconds=0.0, lead_in=0.002)
    with without_gpu():
        found = {form: measure(calls(choice), effort) for form, choice in FORMS.items()}
        with patch.object(Dispatcher, "bind", lambda *given: None):
            return found | {"general way": measure(calls(None), effort)}


def table(found: Mapping[str, Mapping[str, Sample]]) -> str:
    """Microseconds per call, in Markdown."""
    lines = [f"| {SHAPE}, float32, us of the host | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for call in next(iter(found.values())):
        lines.append(f"| `{call}` | {' | '.join(f'{1e6 * form[call].median:.1f}' for form in found.values())} |")
    return "\n".join(lines)
