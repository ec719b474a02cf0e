"""A model from a few words: ``file.py:factory``, or what Hugging Face calls an architecture.

``file.py:factory`` and ``module:factory`` are imported and called: that runs the user's own code. A
Hugging Face name runs transformers' code only: what a folder or a repository has beside its
configuration, be it code, kernels or pickled weights, is neither run nor read. No weights are
allocated either: models are built on the meta device, where the largest costs as little as the
smallest.
"""

import importlib
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import requests
import torch
from torch import nn

from muonkit._text import meant
from muonkit.lab.errors import LabError
from muonkit.lab.source import content_of, is_file, module_of, path_of, search_here, suggested

#: More than any config.json has, in bytes.
_MOST = 1 << 24


def load_model(spec: str) -> nn.Module:
    """The model that ``spec`` names.

    Args:
        spec: ``path/file.py:name`` or ``package.module:name``, where the name is an ``nn.Module``
            or can be called without arguments to make one (for modules the current folder is
            searched too); or a model type of transformers (``gpt2``); or a ``config.json``, a
            folder with one, or the id of a model on the Hugging Face hub.

    Raises:
        LabError: there is no such thing, or it is no model.
        TaskError: the user's file failed.
    """
    if ":" in spec and not Path(spec).exists():
        return _from_import(spec)
    if spec.endswith(".py"):
        path_of(spec)
        raise LabError(f"{spec!r} has no factory: write {suggested(spec, 'model')}")
    return _from_transformers(spec)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _import(name: str) -> Any:
    if is_file(name):
        file = path_of(name)
        with torch.device("cpu"):
            return module_of(name, file, content_of(file))
    search_here()
    try:
        with torch.device("cpu"):  # what a module makes for all its users is no model's
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise LabError(
                f"there is no module {name!r}: {_meant(name)}run from the folder that has it, or "
                "install it"
            ) from error
        raise LabError(f"{name} needs {error.name}, which is not installed") from error
    except (Exception, SystemExit) as error:  # a script's sys.exit() would end us without a word
        raise LabError(f"importing {name} failed: {_one_line(error)}") from error


def _hint(got: str, options: Iterable[str]) -> str:
    """What may have been meant, with a blank behind it; empty where nothing is close."""
    found = meant(got, options)
    return f"{found} " if found else ""


def _meant(name: str) -> str:
    """A hint at the module of the current folder whose name is closest."""
    folder = Path(*name.split(".")[:-1])
    near = [path.with_suffix("") for path in folder.glob("*.py")]
    return _hint(name, [".".join(path.parts) for path in near])


def _from_import(spec: str) -> nn.Module:
    module_name, _, path = spec.rpartition(":")
    if not module_name or not path:
        raise LabError(
            f"{spec!r} is not file.py:factory or package.module:factory: write both sides of "
            "the colon"
        )
    found = _import(module_name)
    for part in path.split("."):
        if not hasattr(found, part):
            public = [n for n in dir(found) if not n.startswith("_")]
            raise LabError(
                f"{module_name} has no {path!r}: {_hint(part, public)}it has "
                f"{', '.join(public[:12]) or 'nothing'}"
            )
        found = getattr(found, part)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise LabError(f"{spec} is of type {type(found).__name__}: name a factory or a model")
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise LabError(
                f"{spec}() failed ({_one_line(error)}): name a factory that takes no arguments"
            ) from error
    if not isinstance(found, nn.Module):
        raise LabError(
            f"{spec}() returned {type(found).__name__}, expected a torch.nn.Module: name the "
            "function or the class that makes the model"
        )
    return found


def _config(transformers: Any, spec: str) -> Any:
    """The configuration called ``spec``: a known model type, else a file, else from the hub."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if spec in CONFIG_MAPPING:
        return transformers.AutoConfig.for_model(spec)
    if Path(spec).exists():
        try:
            _check_file(Path(spec))
            return transformers.AutoConfig.from_pretrained(spec, trust_remote_code=False)
        except Exception as error:
            raise LabError(
                f"{spec} is no Hugging Face configuration ({_one_line(error)}): name a "
                "config.json with a model_type that transformers has, or its folder; a model whose "
                "code lies beside it is not built, since that would run it: use file.py:factory"
            ) from error
    try:
        return transformers.AutoConfig.from_pretrained(
            spec, local_files_only=not _online(spec), trust_remote_code=False
        )
    except Exception as error:
        if spec.isidentifier() and Path(f"{spec}.py").is_file():
            raise LabError(
                f"{spec!r} is no model type, but {spec}.py is here: name its factory, as "
                f"{spec}:build"
            ) from error
        raise LabError(
            f"{spec!r} is no model type, no file, and could not be had from the Hugging Face hub: "
            f"{_hint(spec, CONFIG_MAPPING)}"
            "use file.py:factory, a type such as gpt2, llama or bert, or a config.json"
        ) from error


def _check_file(path: Path) -> None:
    """Refuse a pipe, which would be waited for, and what is too large for a configuration."""
    path = path / "config.json" if path.is_dir() else path
    size = path.stat().st_size
    if not path.is_file() or size > _MOST:
        raise ValueError(f"{path} is no plain file of at most {_MOST:,} bytes, it has {size:,}")


def _online(name: str) -> bool:
    """Whether the hub answers for ``name``; its own client would retry for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    address = f"{constants.ENDPOINT}/{name}/resolve/main/config.json"
    try:
        requests.head(address, timeout=10)
    except requests.RequestException:
        return False
    return True


def _without_kernels(config: Any) -> Any:
    """``config`` as a model is built from it without code of the hub: a configuration can name a
    repository of attention kernels, which transformers would fetch and import.
    """
    for name in ("_attn_implementation", "_experts_implementation"):
        if hasattr(config, name):
            setattr(config, name, "eager")
    return config


def _model_class(transformers: Any, config: Any) -> Any:
    for name in getattr(config, "architectures", None) or ():
        # The name is the file's: of all that transformers has, models only.
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    auto = transformers.models.auto.modeling_auto
    for mapping, made_by in (
        (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, transformers.AutoModelForSeq2SeqLM),
        (auto.MODEL_FOR_MASKED_LM_MAPPING, transformers.AutoModelForMaskedLM),
        (auto.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.AutoModelForCausalLM),
        (
            auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
            transformers.AutoModelForImageClassification,
        ),
    ):
        if type(config) in mapping:
            return made_by
    return transformers.AutoModel


def _from_transformers(spec: str) -> nn.Module:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise LabError(
            f"{spec!r} is not file.py:factory, and Hugging Face names need transformers: "
            "pip install transformers"
        ) from error
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = _without_kernels(_config(transformers, spec))
        try:
            made_by = _model_class(transformers, config)
            from_config = getattr(made_by, "from_config", None)  # of the Auto classes
            build = partial(from_config, trust_remote_code=False) if from_config else made_by
            with torch.device("meta"):
                model = build(config)
        except Exception as error:
            raise LabError(
                f"transformers cannot build {spec!r} ({_one_line(error)}): use file.py:factory"
            ) from error
    if not isinstance(model, nn.Module):
        raise LabError(f"{spec!r} became {type(model).__name__}, expected a torch.nn.Module")
    return model
