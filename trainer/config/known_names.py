"""What people who come from other trainers type, and what patterns of settings ask for."""

from __future__ import annotations

# What people who come from other trainers type, and our name for it.
KNOWN_ELSEWHERE = {
    "network_dim": "adapter.rank",
    "lora_rank": "adapter.rank",
    "network_alpha": "adapter.alpha",
    "lora_alpha": "adapter.alpha",
    "lr": "optimizer.learning_rate",
    "unet_lr": "optimizer.learning_rate",
    "text_encoder_lr": "optimizer.text_encoder_learning_rate",
    "lr_scheduler": "optimizer.schedule",
    "lr_warmup_steps": "optimizer.warmup_steps",
    "optimizer_type": "optimizer.name",
    "use_8bit_adam": "optimizer.name",
    "gradient_accumulation_steps": "optimizer.accumulate_steps",
    "train_batch_size": "data.batch_size",
    "max_train_steps": "run.total_steps",
    "steps": "run.total_steps",
    "save_every_n_steps": "run.save_every_steps",
    "checkpointing_steps": "run.save_every_steps",
    "sample_every_n_steps": "preview.every_steps",
    "sample_prompts": "preview.prompts",
    "validation_prompt": "preview.prompts",
    "pretrained_model_name_or_path": "model.base",
    "mixed_precision": "model.precision",
    "gradient_checkpointing": "model.checkpointing",
    "blocks_to_swap": "model.stream_blocks",
    "layer_offload_fraction": "model.stream_blocks",
    "low_vram": "model.memory",
    "instance_prompt": "caption.trigger",
    "class_prompt": "caption.class_noun",
    "prior_loss_weight": "objective.prior_weight",
    "num_class_images": "objective.prior_pictures",
    "snr_gamma": "objective.min_snr_gamma",
    "flip_aug": "data.flip",
    "color_aug": "data.flip",
    "clip_grad_norm": "optimizer.max_grad_norm",
}

# What the patterns of text settings ask for, in words.
PATTERN_WORDS = {
    "caption.trigger": "should be one word without spaces, commas, colons or brackets",
    "data.background": "should be a colour like '#ffffff'",
    "run.name": "should be a file name of letters, digits, '.', '_' and '-'",
}
