"""A model from a few words: ``module:factory``, or what Hugging Face calls an architecture.

No weights are read and none are allocated for Hugging Face models: they are built on the meta
device, where the largest costs as little as the smallest.
"""

import importlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import requests
import torch
from torch import nn

from muonkit.lab.errors import LabError


def load_model(spec: str) -> nn.Module:
    """The model that ``spec`` names.

    Args:
        spec: ``package.module:name``, where the name is an ``nn.Module`` or can be called
            without arguments to make one (the current folder is searched too); or a model type
            of transformers (``gpt2``); or a ``config.json``, a folder with one, or the id of a
            model on the Hugging Face hub.

    Raises:
        LabError: there is no such thing, or it is no model.
    """
    if ":" in spec and not Path(spec).exists():
        return _from_import(spec)
    return _from_transformers(spec)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _import(name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise LabError(
                f"there is no module {name!r}: run from the folder that has it, or install it"
            ) from error
        raise LabError(f"{name} needs {error.name}, which is not installed") from error
    except Exception as error:
        raise LabError(f"importing {name} failed: {_one_line(error)}") from error


def _from_import(spec: str) -> nn.Module:
    module_name, _, path = spec.partition(":")
    if not module_name or not path:
        raise LabError(f"{spec!r} is not package.module:factory: write both sides of the colon")
    found = _import(module_name)
    for part in path.split("."):
        if not hasattr(found, part):
            public = [n for n in dir(found) if not n.startswith("_")]
            raise LabError(
                f"{module_name} has no {path!r}: it has {', '.join(public[:12]) or 'nothing'}"
            )
        found = getattr(found, part)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise LabError(f"{spec} is of type {type(found).__name__}: name a factory or a model")
        try:
            found = found()
        except Exception as error:
            raise LabError(
                f"{spec}() failed ({_one_line(error)}): name a factory that takes no arguments"
            ) from error
    if not isinstance(found, nn.Module):
        raise LabError(f"{spec}() returned {type(found).__name__}, expected a torch.nn.Module")
    return found


def _config(transformers: Any, spec: str) -> Any:
    """The configuration called ``spec``: a known model type, else a file, else from the hub."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if spec in CONFIG_MAPPING:
        return transformers.AutoConfig.for_model(spec)
    if Path(spec).exists():
        try:
            return transformers.AutoConfig.from_pretrained(spec)
        except Exception as error:
            raise LabError(
                f"{spec} is no Hugging Face configuration ({_one_line(error)}): name a "
                "config.json with a model_type, or its folder"
            ) from error
    try:
        return transformers.AutoConfig.from_pretrained(spec, local_files_only=not _online(spec))
    except Exception as error:
        raise LabError(
            f"{spec!r} is no model type, no file, and could not be had from the Hugging Face hub: "
            "use module:factory, a type such as gpt2, llama or bert, or a config.json"
        ) from error


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


def _model_class(transformers: Any, config: Any) -> Any:
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
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
            f"{spec!r} is not package.module:factory, and Hugging Face names need transformers: "
            "pip install transformers"
        ) from error
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = _config(transformers, spec)
        made_by = _model_class(transformers, config)
        build = getattr(made_by, "from_config", None) or made_by
        try:
            with torch.device("meta"):
                model = build(config)
        except Exception as error:
            raise LabError(
                f"transformers cannot build {spec!r} ({_one_line(error)}): use module:factory"
            ) from error
    if not isinstance(model, nn.Module):
        raise LabError(f"{spec!r} became {type(model).__name__}, expected a torch.nn.Module")
    return model
