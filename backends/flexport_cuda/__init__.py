"""CUDA backend for flexport: NVIDIA cards, and AMD cards where torch is built for ROCm."""

from flexport.backend import Backend, BackendPlugin, Capabilities

__all__ = ["PLUGIN"]


def _probe() -> str | None:
    from flexport_cuda.driver import reason_not_usable

    return reason_not_usable()


def _open() -> Backend:
    from flexport_cuda.backend import CudaBackend

    return CudaBackend.open()


def _open_index(index: int) -> Backend:
    from flexport_cuda.backend import CudaBackend

    return CudaBackend.open(index)


def _describe(index: int = 0) -> Capabilities | None:
    from flexport_cuda.driver import described

    return described(index)


PLUGIN = BackendPlugin(
    api=1,
    rank=100,
    probe=_probe,
    open=_open,
    describe=_describe,
    open_index=_open_index,
    describe_index=_describe,
)
