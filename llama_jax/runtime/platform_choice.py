"""Keeps JAX from loading libtpu where it is installed, for `plan`, but the machine has no TPU.

JAX starts every platform whose library is installed. Without a TPU, libtpu prints five lines of
errors first. This module decides from the hardware, before anything imports JAX.
"""

import os
import pkgutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

# Set on TPU VMs and in GKE's pods, or by a user who wants a TPU. JAX itself sets others.
_TPU_VARIABLES = ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE", "JAX_FORCE_TPU_INIT")
_GOOGLE = "0x1ae0"  # PCI vendor
# PCI classes of Google's virtual disks and network cards, which all of its virtual machines have.
_STORAGE_AND_NETWORK = ("0x01", "0x02")
_NVIDIA_FILES = ("nvidia0", "nvidiactl", "dxg")  # in /dev: a GPU, in containers, in WSL2


def skip_missing_tpu() -> None:
    """Sets JAX_PLATFORMS in the environment if libtpu is installed and the machine has no TPU.

    JAX_PLATFORMS of the user has precedence; an empty one lets JAX choose among all platforms.
    """
    library = "TPU_LIBRARY_PATH" in os.environ or find_spec("libtpu")
    if "JAX_PLATFORMS" in os.environ or not library or has_tpu(os.environ):
        return
    if platforms := platforms_without_tpu(os.environ, _plugins()):
        os.environ["JAX_PLATFORMS"] = platforms


def has_tpu(environment: Mapping[str, str], root: Path = Path("/")) -> bool:
    """Returns whether the machine has a TPU, by its environment, device files and PCI devices.

    Args:
        environment: variables of the process.
        root: folder that contains dev and sys.
    """
    if any(environment.get(name) for name in _TPU_VARIABLES):
        return True
    if any(root.glob("dev/accel*")) or any(root.glob("dev/vfio/[0-9]*")):
        return True
    return any(map(_is_tpu, root.glob("sys/bus/pci/devices/*")))


def platforms_without_tpu(
    environment: Mapping[str, str], plugins: set[str], root: Path = Path("/")
) -> str | None:
    """Returns the JAX_PLATFORMS of a machine without a TPU; None leaves the choice to JAX.

    Args:
        environment: variables of the process.
        plugins: modules of JAX's plugins, such as 'xla_cuda12'.
        root: folder that contains dev.
    """
    if any(not name.startswith("xla_cuda") for name in plugins):
        return None  # of an accelerator that this module doesn't know
    hidden = environment.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    if not plugins or hidden or not any((root / "dev" / name).exists() for name in _NVIDIA_FILES):
        return "cpu"
    return "cuda,cpu"


def _is_tpu(device: Path) -> bool:
    try:
        vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
    except OSError:  # removed since it was listed
        return False
    return vendor == _GOOGLE and not kind.startswith(_STORAGE_AND_NETWORK)


def _plugins() -> set[str]:
    """Returns the names of JAX's plugins, found in the two places where JAX looks for them."""
    from importlib.metadata import entry_points  # slow, and mostly not needed

    namespace = find_spec("jax_plugins")
    folders = namespace.submodule_search_locations if namespace else None
    names = {module.name for module in pkgutil.iter_modules(folders)} if folders else set()
    values = (point.value for point in entry_points(group="jax_plugins"))
    return names | {value.rpartition(".")[2] for value in values}
