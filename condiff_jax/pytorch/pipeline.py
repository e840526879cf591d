"""A diffusers pipeline for exported models, with control values and guidance of Eq. 2.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    pipe("a red circle", guidance_scale=4.0, control={"height": 96, "width": 96}).images[0]

Equations are those of "On Improved Conditioning Mechanisms and Pre-training Strategies for
Diffusion Models" (NeurIPS 2024). In Eq. 2, guidance_scale is lambda and control_guidance_scale is
beta. Noise that is not passed is drawn from `generator`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class ConditionedPipeline(DiffusionPipeline):
    """Pipeline from prompts or class labels to images.

    network: the `Network` of models.py. scheduler: the exported DDIM scheduler, with the noise
    levels of training, or another scheduler of diffusers.
    """

    def __init__(self, network, scheduler):
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)
        self.clip = None  # (tokenizer, text encoder) of CLIP, loaded at first use

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | list[int] | None = None,
        *,
        control: dict[str, float] | None = None,
        guidance_scale: float | None = None,
        control_guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
        latents: torch.Tensor | None = None,
        text_noise: torch.Tensor | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Sample images for prompts (text models) or for class labels.

        control: values by name for all images, sizes in pixels and crops as fractions of the
        original; the names are those in settings["control"] of the network. latents (B, C, H, W):
        x_T, standard normal. text_noise (B, T, C): the noise of Eq. 7. output_type: pil, np, pt, or
        latent for x_0. Arguments that are left out take the values in the network's settings.
        """
        settings = self.network.settings
        steps = num_inference_steps or settings["steps"]
        scale = settings["guidance"] if guidance_scale is None else guidance_scale
        beta = settings["control_guidance"]
        beta = beta if control_guidance_scale is None else control_guidance_scale
        device, dtype = self.network.device, self.network.dtype
        text = self.network.is_text_conditioned
        inputs = prompt if text else class_labels
        if inputs is None:
            raise ValueError(f"pass {'prompt' if text else 'class_labels'}")
        inputs = inputs if isinstance(inputs, (list, tuple)) else [inputs]
        batch = len(inputs)
        x = latents
        if x is None:
            x = randn_tensor((batch, *settings["shape"]), generator, device, dtype)
        if text:
            noise_shape = (batch, *self.network.text_shape)
            if text_noise is None:
                text_noise = randn_tensor(noise_shape, generator, device, dtype)
            semantics = self.embed(inputs, text_noise.to(device, dtype))
        else:
            semantics = torch.tensor(inputs, device=device)
        control = self.network.control(control or {}, batch, device)
        self.scheduler.set_timesteps(steps, device=device)
        x = x.to(device, dtype) * self.scheduler.init_noise_sigma
        extra = {}
        if type(self.scheduler).__name__ == "DDIMScheduler":
            extra = {"eta": eta, "generator": generator}
            extra["use_clipped_model_output"] = self.scheduler.config.clip_sample
        for t in self.progress_bar(self.scheduler.timesteps):
            out = self.guided(
                self.scheduler.scale_model_input(x, t), t, semantics, control, scale, beta
            )
            x = self.scheduler.step(out, t, x, **extra).prev_sample
        if output_type == "latent":
            return ImagePipelineOutput(images=x)
        images = self.network.decode(x)
        processor = VaeImageProcessor(do_normalize=True)
        return ImagePipelineOutput(images=processor.postprocess(images, output_type=output_type))

    def embed(self, prompts: list[str], noise: torch.Tensor):
        """Encode prompts by the network's text encoder or by CLIP; noise: that of Eq. 7."""
        source = self.network.settings.get("clip")
        if source is None:
            return self.network.embed(prompts, noise)
        if self.clip is None:
            from transformers import CLIPTextModel, CLIPTokenizer

            # Stable Diffusion's folders have encoder and tokenizer in folders of their own.
            split = (Path(source) / "text_encoder").is_dir()
            parts = ("text_encoder", "tokenizer") if split else ("", "")
            encoder = CLIPTextModel.from_pretrained(source, subfolder=parts[0])
            tokenizer = CLIPTokenizer.from_pretrained(source, subfolder=parts[1])
            self.clip = tokenizer, encoder.eval()
        tokenizer, encoder = self.clip
        length = self.network.text_shape[0]
        batch = tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(noise.device)
        # Attention is causal, so that padding needs no mask.
        out = encoder.to(noise.device, noise.dtype)(batch.input_ids)
        mask = batch.attention_mask.bool()
        return self.network.pad(out.last_hidden_state, out.pooler_output, mask, noise)

    def guided(self, x, t, semantics, control, scale: float, beta: float) -> torch.Tensor:
        """Eq. 2 as one batch: weighted sum of eps (or v) over the branches of nonzero weight."""
        branches = [  # (weight, drop_semantics, drop_control)
            (scale * beta, False, False),
            (scale * (1 - beta), False, True),
            (1 - scale, True, True),
        ]
        branches = [branch for branch in branches if branch[0]]
        n, batch = len(branches), len(x)

        def repeat(a):
            if a is None or isinstance(a, torch.Tensor):
                return None if a is None else torch.cat([a] * n)
            return type(a)(*map(repeat, a))

        drop = [
            torch.tensor([branch[i] for branch in branches], device=x.device).repeat_interleave(
                batch
            )
            for i in (1, 2)
        ]
        out = self.network.model(
            repeat(x), t.expand(n * batch).to(x.device), repeat(semantics), repeat(control), *drop
        )
        return sum(weight * part for (weight, *_), part in zip(branches, out.chunk(n), strict=True))
