"""Every constant of the recipe that made the embedded base."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recipe:
    """Sizes, amounts and rates of all stages; counts of steps are optimizer steps."""

    seed: int = 1

    # Drawings and captions.
    resolution_px: int = 64
    pictures: int = 40_000
    held_out_pictures: int = 512
    captions_per_picture: int = 8
    vocabulary: int = 850
    tokens: int = 77

    # Autoencoder: 64 px to a 16 x 16 x 4 latent.
    vae_channels: tuple[int, ...] = (16, 32, 64)
    vae_steps: int = 4_500
    vae_batch: int = 16
    vae_rate: float = 2e-3
    vae_latent_noise: float = 0.05
    vae_gradient_weight: float = 0.5
    vae_latent_penalty: float = 1e-3
    vae_recoloured_share: float = 0.4
    polish_steps: int = 800
    polish_rate: float = 1e-3
    latent_std: float = 0.6

    # Text encoder.
    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    text_mlp: int = 384
    text_steps: int = 2_000
    text_batch: int = 48
    text_rate: float = 1e-3

    # Denoiser, trained together with the text encoder.
    unet_channels: tuple[int, ...] = (32, 64, 128)
    unet_norm_groups: int = 4
    unet_heads: int = 2
    unet_steps: int = 26_000
    unet_batch: int = 16
    unet_rate: float = 1.5e-3
    unet_text_rate_share: float = 0.3
    unet_warmup_steps: int = 300
    unet_decay_share: float = 0.25
    unet_final_rate_share: float = 0.02
    empty_caption_share: float = 0.1
    offset_noise: float = 0.15
    min_snr_gamma: float = 5.0
    # How much more an error in the face counts than one elsewhere (eyes and mouths are small).
    face_weight: float = 5.0
    clip_norm: float = 1.0
    weight_decay: float = 1e-2
    ema_decay: float = 0.999

    save_every_steps: int = 500
