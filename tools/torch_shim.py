"""Makes torchvision and torchaudio importable next to a torch they were not built for.

The registry's wheels are CUDA builds; beside a CPU torch their compiled parts do not load and
the import fails, although the hosts only need the Python parts.
"""

import importlib
import sys
import types

_LIBRARIES = []


def _importable(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return True
        _forget(name)
        return False
    except (ImportError, OSError, RuntimeError):
        _forget(name)
        return False
    return True


def _forget(name):
    for module in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
        del sys.modules[module]


def _define_vision_operators():
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # The operators vanish with the object that defined them.
    _LIBRARIES.append(library)


def _stand_in_audio_extension():
    extension = types.ModuleType("torchaudio._extension")
    extension._IS_TORCHAUDIO_EXT_AVAILABLE = False
    extension._IS_ALIGN_AVAILABLE = False
    extension.fail_if_no_align = lambda _function: _needs_audio_extension
    extension._load_lib = _needs_audio_extension
    sys.modules["torchaudio._extension"] = extension


def _needs_audio_extension(*_args, **_kwargs):
    raise RuntimeError("this torchaudio has no compiled extension next to this torch build")


def install():
    """Repair torchvision and torchaudio where the plain import fails; return the repaired names.

    A package that is not installed at all is left alone. Raises ImportError when a repair did
    not help.
    """
    repaired = []
    for name, repair in (("torchvision", _define_vision_operators), ("torchaudio", _stand_in_audio_extension)):
        if _importable(name):
            continue
        repair()
        importlib.import_module(name)
        repaired.append(name)
    return repaired
