"""Any Hugging Face decoder-only causal LM with routers: forward, plan, generate (the hf path).

No modelling code is copied: the base's own class is subclassed, and its decoder layers are given a
class that consults a `Routing` before they run. Letters: B sequences, T tokens, L layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from firstlm.base_weights import Sample, changed_weights
from firstlm.cache_argument import find_cache, set_cache
from firstlm.checkpoint import save_checkpoint
from firstlm.generation import (
    check_supported,
    drop_cache_if_replanned,
    named_arguments,
    option_of,
)
from firstlm.layer_calls import LayerCalls, counting_layer_calls
from firstlm.prompt import (
    check_labels_leave_a_prompt,
    check_one_document_a_row,
    default_prompt_mask,
    mask_of_padding,
    position_ids_of,
)
from firstlm.router import Router, RouterConfig, warn_of_other_prefill
from firstlm.routing import RoutedLayer, Routing, is_unobserved, routed_layer_class
from firstlm.skip_cache import SkipCache
from firstlm.skip_plan import (
    RoutingOutput,
    SkipPlan,
    check_plan_choice,
    check_protected,
    exact_budget_mask,
    mask_to_plans,
    planned_rows,
    plans_to_mask,
)


class RoutedModel:
    """Mixed into a causal LM class by `routed_model_class`. See `firstlm.from_pretrained`.

    Attributes:
        router_config: resolved `RouterConfig`.
        decoder_layers: the base's `ModuleList`; each layer has a `router`.
        merged_adapter: the adapter that `from_pretrained` merged into the base's weights, if any.
        trained_prefill: `prefill` of the checkpoint that the routers came from, if any.
        loaded_base: some values of the base's weights as `from_pretrained` has loaded them.
    """

    router_config: RouterConfig
    merged_adapter: str | None = None
    trained_prefill: str | None = None
    loaded_base: Mapping[str, Sample] = types.MappingProxyType({})

    # -- construction -----------------------------------------------------------------------------
    def attach_routers(self, config: RouterConfig) -> None:
        """Give every decoder layer a fresh router, and the class that obeys it."""
        layers = self.decoder_layers
        self.router_config = config.resolved(len(layers))
        hidden_size = self.config.get_text_config(decoder=True).hidden_size
        for layer_idx, layer in enumerate(layers):
            device = _execution_device(layer)
            layer.router = Router(self.router_config, hidden_size, layer_idx, device)
            if not isinstance(layer, RoutedLayer):
                layer.__class__ = routed_layer_class(type(layer))
                if hasattr(layer, "_old_forward"):  # what accelerate's hooks call, of the old class
                    layer._old_forward = types.MethodType(type(layer).forward, layer)

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The decoder layers in order."""
        return find_decoder_layers(self)

    def router_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of all routers, layer by layer."""
        for layer in self.decoder_layers:
            yield from layer.router.parameters()

    def set_thresholds(self, thresholds: Sequence[float]) -> None:
        """Replace the thresholds, one a layer; how the old ones were chosen is forgotten."""
        self.router_config = dataclasses.replace(
            self.router_config, thresholds=[float(t) for t in thresholds], choice=None
        ).resolved(len(self.decoder_layers))

    # -- forward ----------------------------------------------------------------------------------
    def _routed_forward(
        self,
        base_forward: Callable[..., ModelOutput],
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        *,
        cache: SkipCache | None = None,
        past_key_values: SkipCache | None = None,
        prompt_mask: torch.Tensor | None = None,
        skip_plan: SkipPlan | Sequence[SkipPlan] | torch.Tensor | None = None,
        gate: str | None = None,
        thresholds: Sequence[float] | None = None,
        compute_skipped: bool = False,
        exact_budget: float | None = None,
        rows_per_prompt: int = 1,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """The base's forward under skip plans; takes all of the base's arguments and these.

        Args:
            cache, past_key_values: two names of one argument.
            prompt_mask: bool `[B, T]`, the tokens that the routers read. Default: the unmasked
                tokens before the first label that is not -100; without labels all unmasked tokens.
            skip_plan: one `SkipPlan`, one a sequence, or a keep mask `[B, L]`; replaces the
                routers' decisions (their scores are still reported).
            gate: None (inference), "soft", "straight_through" or "hard" (training), see `Routing`.
            thresholds: replaces `router_config.thresholds` for this pass.
            compute_skipped: see `Routing`.
            exact_budget, rows_per_prompt: used by `generate`.

        Returns:
            The base's output with `keep_prob [B, L]`, `keep_mask` bool `[B, L]`, `skip_loss` (the
            mean gate over sequences and layers: the expected share of kept layers) and the property
            `skip_plans`; these are None in a pass that follows the plans of a filled cache.

        Raises:
            ValueError: arguments that do not fit together; the message names the accepted ones.
            TypeError: a cache that is not a `SkipCache`.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise ValueError("forward needs input_ids [B, T] or inputs_embeds [B, T, D]")
        batch_size, num_layers = tokens.shape[0], len(self.decoder_layers)
        cache = find_cache({"cache": cache, "past_key_values": past_key_values})
        if cache is None and use_cache is None:
            use_cache = self._wants_cache(labels, inputs_embeds, gate)
        cache = self._cache_for(cache, bool(use_cache))
        follows_cache = cache is not None and cache.get_seq_length() > 0
        if cache is not None and cache.batch_size >= 0:
            cache.check_batch(batch_size)
            if skip_plan is None and not follows_cache:
                skip_plan = cache.keep_mask  # of SkipCache.set_plans
        plan = None if skip_plan is None else plans_to_mask(skip_plan, batch_size, num_layers)
        if plan is not None and follows_cache and not torch.equal(plan, cache.keep_mask):
            raise ValueError(
                "skip_plan differs from the plans of the cache; use generate(replan=True) or an "
                "empty cache"
            )
        judges = plan is None and not follows_cache and not torch.compiler.is_compiling()
        if prompt_mask is None and not follows_cache:
            prompt_mask = default_prompt_mask(tokens, attention_mask, labels)
            if judges and labels is not None:
                check_labels_leave_a_prompt(prompt_mask, attention_mask)
        if judges and kwargs.get("position_ids") is not None:
            check_one_document_a_row(kwargs["position_ids"], attention_mask)
        config = self.router_config
        if gate is None:
            warn_of_other_prefill(self.trained_prefill, config.prefill, stacklevel=3)
        routing = Routing(
            num_layers,
            prompt_mask,
            list(config.thresholds if thresholds is None else thresholds),
            config.protected,
            prefill=config.prefill,
            gate=gate,
            plan=plan,
            plan_rows=None if plan is None else planned_rows(skip_plan, plan, tokens.device),
            cache=cache,
            compute_skipped=compute_skipped,
            rows_per_prompt=rows_per_prompt,
            exact_budget=exact_budget,
            unobserved=self._states_are_unobserved(**kwargs),
        )
        set_cache(kwargs, cache)
        outputs = base_forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=cache is not None,
            return_dict=True,
            routing=routing,
            **kwargs,
        )
        result = _with_routing(outputs, routing)
        return result.to_tuple() if return_dict is False else result

    def _states_are_unobserved(
        self, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> bool:
        """Whether nothing but the next layer sees what a decoder layer returns."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return not output_hidden_states and is_unobserved(self.decoder_layers)

    def _wants_cache(
        self, labels: torch.Tensor | None, inputs_embeds: torch.Tensor | None, gate: str | None
    ) -> bool:
        """Whether a pass that was not told to keeps its keys and values.

        A cache has no autograd history, so none is kept where something could learn from it.
        """
        if labels is not None or not getattr(self.config, "use_cache", True):
            return False
        if not torch.is_grad_enabled():
            return True
        if self.training or gate is not None or torch.compiler.is_compiling():
            return False
        routers = {id(p) for p in self.router_parameters()}
        learns = any(p.requires_grad for p in self.parameters() if id(p) not in routers)
        return not learns and (inputs_embeds is None or not inputs_embeds.requires_grad)

    def _cache_for(self, cache: SkipCache | None, use_cache: bool) -> SkipCache | None:
        if cache is not None:
            if not isinstance(cache, SkipCache):
                raise TypeError(
                    f"a routed model decodes with a SkipCache, got {type(cache).__name__}; pass "
                    "firstlm.SkipCache(model.config) or no cache"
                )
            return cache
        return SkipCache(self.config) if use_cache else None

    # -- plan -------------------------------------------------------------------------------------
    @torch.no_grad()
    def plan(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        budget: float | None = None,
        budget_mode: str = "threshold",
        **kwargs: Any,
    ) -> RoutingOutput:
        """The plans of some prompts, without decoding.

        Args:
            input_ids: `[B, T]`, padded on either side.
            attention_mask: `[B, T]`; None: as `generate` takes it to be.
            budget, budget_mode: as in `generate`.
            **kwargs: as in `forward`, for example `prompt_mask`, `thresholds` or `skip_plan`.
        """
        check_plan_choice(kwargs.get("skip_plan"), budget, budget_mode)
        if kwargs.get("skip_plan") is not None:
            mask = plans_to_mask(kwargs["skip_plan"], len(input_ids), len(self.decoder_layers))
            check_protected(mask, self.router_config.protected)
        attention_mask = self._mask_of(input_ids, attention_mask, {})
        if budget is not None:
            kwargs |= self._budget_arguments(
                budget, budget_mode, input_ids, attention_mask, kwargs.get("inputs_embeds")
            )
        if attention_mask is not None and "position_ids" not in kwargs:
            kwargs["position_ids"] = position_ids_of(attention_mask)
        outputs = self(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            logits_to_keep=1,
            **kwargs,
        )
        return RoutingOutput(mask_to_plans(outputs.keep_mask), outputs.keep_prob.detach())

    def _mask_of(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> torch.Tensor | None:
        """The given mask, or the one that transformers' generate would find by itself."""
        if attention_mask is not None or input_ids is None:
            return attention_mask
        pad, end = (
            option_of(self.generation_config, kwargs, name)
            for name in ("pad_token_id", "eos_token_id")
        )
        return mask_of_padding(input_ids, pad, end)

    def _budget_arguments(
        self,
        budget: float,
        budget_mode: str,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
    ) -> dict[str, Any]:
        """The forward arguments that make the next prefill keep a budget."""
        if budget_mode == "threshold":
            return {"thresholds": self.router_config.thresholds_for(budget)}
        if self.router_config.prefill == "full":
            return {"exact_budget": budget}
        # A layer runs before the scores of later layers exist: an exact count takes one unskipped
        # pass for the scores, and the prompt is prefilled again under the plan.
        scores = self.plan(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            skip_plan=SkipPlan.full(len(self.decoder_layers)),
        ).keep_prob
        return {"skip_plan": exact_budget_mask(scores, budget, self.router_config.protected)}

    # -- generate ---------------------------------------------------------------------------------
    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        skip_plan: SkipPlan | Sequence[SkipPlan] | None = None,
        budget: float | None = None,
        budget_mode: str = "threshold",
        replan: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor | ModelOutput:
        """transformers' `generate`, each prompt under its own skip plan.

        Args:
            inputs: token ids `[B, T]` (also as `input_ids=`), left-padded.
            skip_plan: replaces the routers' decisions: one plan, or one a prompt (repeated for
                beams and return sequences). It keeps the protected layers.
            budget: asked skip rate. "threshold": calibrated thresholds, right on average, one
                prefill. "exact": the same number of layers for every prompt, two prefills with
                `prefill="route"`.
            budget_mode: "threshold" or "exact".
            replan: with a filled cache (`cache=`, also as `past_key_values=`): drop it and prefill
                the whole conversation again. Without it a later turn keeps the plan of the first;
                another `skip_plan` or a budget also drops it.

        Returns:
            As transformers; with `return_dict_in_generate=True` also `skip_plans` (one a prompt)
            and `keep_prob [B, L]`.

        Raises:
            ValueError: an option that cannot work with skip plans; the message names the way out.
        """
        check_plan_choice(skip_plan, budget, budget_mode)
        kwargs = named_arguments(inputs, args, kwargs)
        rows_per_prompt = check_supported(self.generation_config, kwargs)
        prompt = kwargs.get("input_ids")
        prompt = kwargs.get("inputs_embeds") if prompt is None else prompt
        if prompt is None:
            raise ValueError("generate needs input_ids [B, T] or inputs_embeds [B, T, D]")
        if skip_plan is not None:
            num_layers = len(self.decoder_layers)
            skip_plan = plans_to_mask(skip_plan, prompt.shape[0], num_layers)
            check_protected(skip_plan, self.router_config.protected)
        cache = find_cache(kwargs)
        if cache is None:
            cache = SkipCache(self.config)
        set_cache(kwargs, cache)
        drop_cache_if_replanned(
            cache, prompt, kwargs.get("attention_mask"), skip_plan, budget, replan, rows_per_prompt
        )
        if cache.get_seq_length() == 0:
            if budget is not None:
                ids = kwargs.get("input_ids")
                mask = self._mask_of(ids, kwargs.get("attention_mask"), kwargs)
                embeds = kwargs.get("inputs_embeds")
                kwargs |= self._budget_arguments(budget, budget_mode, ids, mask, embeds)
            elif skip_plan is not None:
                kwargs["skip_plan"] = skip_plan
            kwargs["rows_per_prompt"] = rows_per_prompt
        result = super().generate(**kwargs)  # type: ignore[misc]
        if isinstance(result, ModelOutput):
            plans = cache.skip_plans or []
            result["skip_plans"] = plans[::rows_per_prompt]
            result["keep_prob"] = cache.keep_prob[::rows_per_prompt]
        return result

    def prepare_inputs_for_generation(
        self,
        *args: Any,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As the base's; what decides plans goes into the first pass only.

        `inputs_embeds` has a name of its own because transformers looks for it in the signature.
        """
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        if not is_first_iteration:
            for name in (
                "skip_plan",
                "thresholds",
                "exact_budget",
                "rows_per_prompt",
                "prompt_mask",
            ):
                kwargs.pop(name, None)
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            *args, is_first_iteration=is_first_iteration, **kwargs
        )

    def generate_batch(self, *args: Any, **kwargs: Any) -> None:
        """Raises: paged generation brings its own cache."""
        raise ValueError(
            "generate_batch pages its own KV cache, which knows no skip plans; use generate() with "
            "a left-padded batch"
        )

    # -- counting ---------------------------------------------------------------------------------
    @contextlib.contextmanager
    def count_layer_calls(self) -> Iterator[LayerCalls]:
        """Count the rows that the attention of every layer really computes.

        Example:
            >>> with model.count_layer_calls() as calls:
            ...     model.generate(**inputs)
            >>> calls.per_token()
        """
        with counting_layer_calls(self, self.decoder_layers) as calls:
            yield calls

    # -- checkpoints ------------------------------------------------------------------------------
    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save routers and, if one is attached, the PEFT adapter; never the base.

        Args:
            save_directory: gets `router_config.json`, `router.safetensors` and `adapter/`.
            is_main_process: false in the processes that are not to write.
            state_dict: the model's, where its own parameters are not whole (as of
                `accelerator.get_state_dict(model)`).
            push_to_hub: also upload, as transformers' `push_to_hub` does (`repo_id=`, `token=`, …).

        Raises:
            ValueError: the base's weights are not those that were loaded, as when an adapter was
                merged into them: the checkpoint would lose what they have learnt.
        """
        if self.merged_adapter is not None:
            raise ValueError(
                f"the adapter {self.merged_adapter} is merged into the base's weights, which are "
                "never saved: load without merge_adapter to save a checkpoint"
            )
        if changed := changed_weights(self, self.loaded_base):
            raise ValueError(
                f"{len(changed)} parameters of the base are not as they were loaded "
                f"({changed[0]}, …), and a checkpoint holds routers and adapter only: save before "
                "merging an adapter or changing the base"
            )
        if not is_main_process:
            return
        save_checkpoint(self, save_directory, state_dict)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", str(save_directory).rstrip("/").split("/")[-1])
            self.push_to_hub(repo_id, **kwargs)


def find_decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The `ModuleList` of decoder layers, found by the class name in `_no_split_modules`.

    Raises:
        ValueError: none is found.
    """
    decoder = model.get_decoder()
    names = set(model._no_split_modules or ())
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) and type(module[0]).__name__ in names:
            return module
    raise ValueError(f"{type(model).__name__}: no list of decoder layers named {sorted(names)}")


def _execution_device(layer: nn.Module) -> torch.device:
    """Where a layer computes, offloaded by accelerate or not."""
    hook = getattr(layer, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else next(layer.parameters()).device


@torch.compiler.assume_constant_result  # making a class is no operation of a graph
def _routed_output_class(base: type[ModelOutput]) -> type[ModelOutput]:
    return _make_routed_output_class(base)


@functools.cache
def _make_routed_output_class(base: type[ModelOutput]) -> type[ModelOutput]:
    fields = [
        (name, torch.Tensor | None, dataclasses.field(default=None))
        for name in ("keep_prob", "keep_mask", "skip_loss")
    ]
    plans = property(lambda out: None if out.keep_mask is None else mask_to_plans(out.keep_mask))
    return dataclasses.make_dataclass(
        f"Routed{base.__name__}", fields, bases=(base,), namespace={"skip_plans": plans}
    )


def _with_routing(outputs: ModelOutput, routing: Routing) -> ModelOutput:
    """`outputs` with the routing fields."""
    decisions = routing.finish()
    fields: dict[str, Any] = dict(outputs)
    if decisions is not None:
        keep_prob, keep_mask, gates = decisions
        fields |= {"keep_prob": keep_prob, "keep_mask": keep_mask, "skip_loss": gates.mean()}
    return _routed_output_class(type(outputs))(**fields)


@functools.cache
def routed_model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`base` with routing. Keeps the name, by which pipelines and Trainer know architectures."""
    base_forward = base.forward
    base_parameters = inspect.signature(base_forward).parameters

    @functools.wraps(RoutedModel._routed_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> ModelOutput:
        if args:  # positional arguments follow the base's order
            kwargs |= dict(zip(list(base_parameters)[1:], args, strict=False))
        return self._routed_forward(base_forward, **kwargs)

    # generate() and Trainer read the signature: the base's arguments and ours.
    ours = inspect.signature(RoutedModel._routed_forward).parameters
    by_name = {
        name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in (base_parameters | ours).items()
        if name not in ("self", "base_forward", "kwargs")
    }
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    last = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    forward.__signature__ = inspect.Signature([first, *by_name.values(), last])  # type: ignore
    return type(
        base.__name__, (RoutedModel, base), {"__module__": base.__module__, "forward": forward}
    )
