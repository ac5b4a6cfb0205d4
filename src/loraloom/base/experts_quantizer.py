"""Experts of a base model in 4 bits, which transformers leaves in floating point."""

import importlib
from typing import Any

from torch import nn
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from loraloom.base.blocks import is_stack


class ExpertsQuantizer(Bnb4BitHfQuantizer):
    """Quantizes each stack as it is read, so that one at a time is in 16 bits."""

    has_stacks = False

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        if is_stack(model, param_name):
            return not self.pre_quantized
        return super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> Any:
        operation: Any = super().get_quantize_ops()
        convert_linear = operation.convert
        parametrize = importlib.import_module("bitsandbytes.nn.parametrize")

        def convert(tensors: dict[str, Any], *, model: Any, **options: Any) -> dict[str, Any]:
            ((name, tensor),) = tensors.items()
            if not is_stack(model, name):
                return convert_linear(tensors, model=model, **options)
            path, _, parameter = name.rpartition(".")
            experts = model.get_submodule(path)
            weight = tensor[0] if isinstance(tensor, list) else tensor
            experts._parameters[parameter] = nn.Parameter(weight, requires_grad=False)
            parametrize.replace_parameter_4bit(
                experts,
                parameter,
                compress_statistics=self.quantization_config.bnb_4bit_use_double_quant,
                quant_type=self.quantization_config.bnb_4bit_quant_type,  # ty: ignore[invalid-argument-type]
            )
            experts._is_hf_initialized = self.has_stacks = True
            options["missing_keys"].discard(name)
            return {}  # nothing is left to be put in its place

        operation.convert = convert
        return operation

    def is_serializable(self) -> bool:
        return not self.has_stacks  # transformers could not read them again
