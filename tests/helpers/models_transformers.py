"""Hugging Face models for the routing tests: class and a small configuration, nothing else.

They are built on the meta device: routing reads shapes, classes and names only. Two layers where a
stack must be seen as one, one where the building is slow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_TEXT: dict[str, Any] = _SMALL | {"vocab_size": 100, "pad_token_id": 0}
_GQA: dict[str, Any] = _TEXT | {"num_key_value_heads": 2}
_VISION: dict[str, Any] = _SMALL | {"image_size": 32, "patch_size": 8}
_D: dict[str, Any] = {"vocab_size": 100, "d_model": 32, "pad_token_id": 0}
_SEQ2SEQ: dict[str, Any] = _D | {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
_WAVE: dict[str, Any] = _TEXT | {
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "feat_extract_norm": "layer",
}

# fmt: off
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    # -- decoders -------------------------------------------------------------------------------
    "deepseek_v3": ("DeepseekV3ForCausalLM", _TEXT | {"num_key_value_heads": 4,
        "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group":
        2, "topk_group": 1, "q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1}),
    "gpt_oss": ("GptOssForCausalLM", _GQA | {"head_dim": 8, "num_local_experts": 4, "layer_types":
        None}),
    "mixtral": ("MixtralForCausalLM", _GQA | {"num_local_experts": 4}),
    "phi3": ("Phi3ForCausalLM", _GQA),
    "gemma3n": ("Gemma3nForCausalLM", _GQA | {"head_dim": 8, "vocab_size_per_layer_input": 100,
        "hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 0,
        "intermediate_size": 64, "activation_sparsity_pattern": None, "layer_types": None}),
    "qwen3_next": ("Qwen3NextForCausalLM", _GQA | {"head_dim": 8, "num_experts": 4,
        "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "linear_key_head_dim":
        8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"]}),
    "falcon": ("FalconForCausalLM", _TEXT | {"new_decoder_architecture": True, "num_kv_heads": 2,
        "alibi": False}),
    "gpt_neox": ("GPTNeoXForCausalLM", _TEXT),
    "gptj": ("GPTJForCausalLM", {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "rotary_dim": 4}),
    "codegen": ("CodeGenForCausalLM", {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "rotary_dim": 4}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {"vocab_size": 100, "n_embd": 32, "n_layer": 2,
        "n_head": 4}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head":
        4, "pad_token_id": 0}),
    "opt": ("OPTForCausalLM", _TEXT | {"ffn_dim": 64, "word_embed_proj_dim": 16,
        "max_position_embeddings": 64}),
    "mpt": ("MptForCausalLM", {"vocab_size": 100, "d_model": 32, "n_layers": 2, "n_heads": 4}),
    "dbrx": ("DbrxForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 100,
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size":
        32}, "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0}}),
    "jetmoe": ("JetMoeForCausalLM", _TEXT | {"num_local_experts": 4, "kv_channels": 8,
        "num_key_value_heads": 2}),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", _GQA | {"num_local_experts": 4,
        "num_experts_per_tok": 2, "shared_intermediate_size": 24, "layer_types": ["mamba",
        "attention"], "layers_block_type": ["mamba", "attention"], "mamba_n_heads": 8,
        "mamba_d_head": 8, "mamba_d_state": 8}),
    # -- state spaces and recurrences -----------------------------------------------------------
    "rwkv": ("RwkvForCausalLM", {"vocab_size": 100, "hidden_size": 32, "attention_hidden_size":
        32, "num_hidden_layers": 2}),
    "mamba": ("MambaForCausalLM", {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2,
        "state_size": 4}),
    "mamba2": ("Mamba2ForCausalLM", {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2,
        "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2}),
    "jamba": ("JambaForCausalLM", _GQA | {"num_hidden_layers": 4, "attn_layer_period": 2,
        "attn_layer_offset": 1, "num_experts": 4, "mamba_d_state": 4, "mamba_dt_rank": 4}),
    "nemotron_h": ("NemotronHForCausalLM", _GQA | {"layers_block_type": ["mamba", "attention",
        "moe", "mlp"], "num_hidden_layers": 4, "mamba_num_heads": 8, "mamba_head_dim": 8,
        "ssm_state_size": 8, "n_groups": 2, "n_routed_experts": 4, "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24}),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", _GQA | {"lru_width": 32, "num_hidden_layers":
        3, "head_dim": 8}),
    "xlstm": ("xLSTMForCausalLM", {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2,
        "num_blocks": 2, "num_heads": 2}),
    "kimi_linear": ("KimiLinearForCausalLM", _GQA | {"num_experts": 4, "n_routed_experts": 4,
        "moe_intermediate_size": 24, "head_dim": 8, "linear_attn_config": {"num_heads": 4,
        "head_dim": 8, "short_conv_kernel_size": 4}}),
    "lfm2": ("Lfm2ForCausalLM", _GQA | {"layer_types": ["conv", "full_attention"],
        "block_multiple_of": 8}),
    # -- encoders -------------------------------------------------------------------------------
    "bert_pretraining": ("BertForPreTraining", _TEXT),
    "bert_qa": ("BertForQuestionAnswering", _TEXT),
    "bert_tokens": ("BertForTokenClassification", _TEXT),
    "roberta_classifier": ("RobertaForSequenceClassification", _TEXT),
    "distilbert_classifier": ("DistilBertForSequenceClassification", {"vocab_size": 100, "dim":
        32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}),
    "electra_pretraining": ("ElectraForPreTraining", _TEXT | {"embedding_size": 16}),
    "electra_masked_lm": ("ElectraForMaskedLM", _TEXT | {"embedding_size": 16}),
    "deberta_v2": ("DebertaV2ForSequenceClassification", _TEXT | {"relative_attention": True,
        "pos_att_type": ["p2c", "c2p"]}),
    "albert": ("AlbertForPreTraining", _TEXT | {"embedding_size": 16}),
    "modernbert_masked_lm": ("ModernBertForMaskedLM", _TEXT),
    "modernbert_classifier": ("ModernBertForSequenceClassification", _TEXT),
    "xlnet": ("XLNetLMHeadModel", {"vocab_size": 100, "d_model": 32, "n_layer": 2, "n_head": 4,
        "d_inner": 64}),
    "xlnet_qa": ("XLNetForQuestionAnswering", {"vocab_size": 100, "d_model": 32, "n_layer": 1,
        "n_head": 4, "d_inner": 64}),
    "reformer": ("ReformerModelWithLMHead", {"vocab_size": 100, "hidden_size": 32, "attn_layers":
        ["local", "lsh"], "num_attention_heads": 4, "attention_head_size": 8, "feed_forward_size":
        64, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "is_decoder": True}),
    "funnel": ("FunnelForPreTraining", {"vocab_size": 100, "block_sizes": [1, 1], "d_model": 32,
        "n_head": 4, "d_head": 8, "d_inner": 64}),
    "layoutlm_tokens": ("LayoutLMv3ForTokenClassification", _TEXT | {"coordinate_size": 4,
        "shape_size": 4, "input_size": 32, "patch_size": 8}),
    # -- encoder and decoder ---------------------------------------------------------------------
    "bart": ("BartForConditionalGeneration", _SEQ2SEQ),
    "bart_classifier": ("BartForSequenceClassification", _SEQ2SEQ),
    "switch": ("SwitchTransformersForConditionalGeneration", _D | {"d_kv": 8, "d_ff": 64,
        "num_layers": 2, "num_heads": 4, "num_decoder_layers": 2, "num_experts": 4,
        "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}),
    # -- sound ----------------------------------------------------------------------------------
    "whisper": ("WhisperForConditionalGeneration", _SEQ2SEQ | {"num_mel_bins": 16,
        "max_source_positions": 32, "max_target_positions": 32}),
    "wav2vec2_pretraining": ("Wav2Vec2ForPreTraining", _WAVE | {"codevector_dim": 16,
        "proj_codevector_dim": 16, "num_codevectors_per_group": 8}),
    "wav2vec2_ctc": ("Wav2Vec2ForCTC", _WAVE),
    "wav2vec2_classifier": ("Wav2Vec2ForSequenceClassification", _WAVE | {"classifier_proj_size":
        16}),
    "speecht5_tts": ("SpeechT5ForTextToSpeech", _WAVE | {"encoder_layers": 1, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64, "speech_decoder_prenet_units": 16, "speech_decoder_postnet_units":
        16, "speech_decoder_postnet_layers": 3, "speaker_embedding_dim": 8, "num_mel_bins": 16}),
    "speecht5_hifigan": ("SpeechT5HifiGan", {"model_in_dim": 16, "upsample_initial_channel": 32,
        "upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4], "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3]]}),
    "vits": ("VitsModel", _TEXT | {"ffn_dim": 64, "flow_size": 16, "spectrogram_bins": 17,
        "upsample_initial_channel": 32, "upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4],
        "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]],
        "depth_separable_num_layers": 1, "duration_predictor_flow_bins": 4,
        "duration_predictor_num_flows": 2, "prior_encoder_num_flows": 2,
        "prior_encoder_num_wavenet_layers": 2, "posterior_encoder_num_wavenet_layers": 2,
        "hidden_size": 16}),
    "encodec": ("EncodecModel", {"num_filters": 4, "hidden_size": 16, "codebook_size": 8,
        "upsampling_ratios": [2, 2]}),
    "dac": ("DacModel", {"encoder_hidden_size": 8, "downsampling_ratios": [2, 2],
        "upsampling_ratios": [2, 2], "decoder_hidden_size": 32, "n_codebooks": 2, "codebook_size":
        16, "codebook_dim": 4}),
    # -- pictures -------------------------------------------------------------------------------
    "vit_mae": ("ViTMAEForPreTraining", _VISION | {"decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 32}),
    "deit": ("DeiTForImageClassificationWithTeacher", _VISION),
    "beit": ("BeitForImageClassification", _VISION | {"use_relative_position_bias": True}),
    "dinov2": ("Dinov2ForImageClassification", _VISION),
    "dinov3": ("DINOv3ViTModel", _VISION),
    "swin": ("SwinForImageClassification", {"image_size": 32, "patch_size": 4, "embed_dim": 8,
        "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}),
    "segformer": ("SegformerForSemanticSegmentation", {"depths": [1, 1, 1, 1], "hidden_sizes": [8,
        16, 24, 32], "decoder_hidden_size": 16, "num_attention_heads": [1, 2, 3, 4]}),
    "dpt_depth": ("DPTForDepthEstimation", _VISION | {"num_hidden_layers": 4,
        "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 8, 8],
        "fusion_hidden_size": 8}),
    "sam": ("SamModel", {"vision_config": {"hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "output_channels": 16,
        "mlp_dim": 64, "global_attn_indexes": [1], "window_size": 2}, "prompt_encoder_config":
        {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 16},
        "mask_decoder_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads":
        2, "mlp_dim": 32, "iou_head_hidden_dim": 16}}),
    "detr": ("DetrForObjectDetection", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64, "num_queries": 5, "use_timm_backbone": False,
        "use_pretrained_backbone": False, "backbone": None, "backbone_config": {"model_type":
        "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "out_features":
        ["stage2"]}}),
    "detr_seg": ("DetrForSegmentation", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2,
        "encoder_attention_heads": 8, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64, "num_queries": 5, "use_timm_backbone": False,
        "use_pretrained_backbone": False, "backbone": None, "backbone_config": {"model_type":
        "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1],
        "out_features": ["stage1", "stage2", "stage3", "stage4"]}}),
    "yolos": ("YolosForObjectDetection", _SMALL | {"image_size": [32, 32], "patch_size": 8,
        "num_detection_tokens": 5}),
    "deformable_detr": ("DeformableDetrForObjectDetection", {"d_model": 32, "encoder_layers": 1,
        "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 5, "num_feature_levels": 2,
        "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
        "backbone_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16],
        "depths": [1, 1], "out_features": ["stage1", "stage2"]}, "with_box_refine": True,
        "two_stage": True}),
    "rt_detr": ("RTDetrForObjectDetection", {"d_model": 32, "encoder_hidden_dim": 32,
        "encoder_in_channels": [16, 16, 16], "feat_strides": [8, 16, 32], "encoder_layers": 1,
        "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 5, "decoder_in_channels":
        [32, 32, 32], "use_timm_backbone": False, "backbone": None, "use_pretrained_backbone":
        False, "backbone_config": {"model_type": "rt_detr_resnet", "embedding_size": 8,
        "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "out_features": ["stage2",
        "stage3", "stage4"]}}),
    "siglip2": ("Siglip2Model", {"text_config": _TEXT, "vision_config": _SMALL | {"patch_size": 8,
        "num_patches": 16}}),
    "levit": ("LevitForImageClassificationWithTeacher", {"image_size": 32, "hidden_sizes": [16,
        32, 48], "num_attention_heads": [2, 4, 6], "depths": [1, 1, 1], "key_dim": [8, 8, 8],
        "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 4, 4, 2, 2]]}),
    "swin2sr": ("Swin2SRForImageSuperResolution", {"image_size": 16, "embed_dim": 16, "depths":
        [1, 1], "num_heads": [2, 2], "window_size": 4}),
    "vitpose": ("VitPoseForPoseEstimation", {"num_labels": 5, "backbone_config": {"model_type":
        "vitpose_backbone", "image_size": [32, 32], "patch_size": [8, 8], "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "out_indices": [2]}}),
    # -- several inputs -------------------------------------------------------------------------
    "clip": ("CLIPModel", {"projection_dim": 32, "text_config": _TEXT, "vision_config":
        _VISION | {"hidden_size": 48}}),
    "siglip": ("SiglipModel", {"text_config": _TEXT, "vision_config": _VISION}),
    "clap": ("ClapModel", {"projection_dim": 16, "text_config": _TEXT, "audio_config":
        {"patch_embeds_hidden_size": 8, "num_mel_bins": 16, "spec_size": 32, "window_size": 4,
        "depths": [1, 1], "num_attention_heads": [2, 2], "hidden_size": 16, "patch_size": 4,
        "patch_stride": [4, 4]}}),
    "llava": ("LlavaForConditionalGeneration", {"vision_config": {"model_type":
        "clip_vision_model", **_VISION}, "text_config": {"model_type": "llama", **_GQA}}),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", {"text_config": _GQA, "vision_config":
        {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4}}),
    "vilt_qa": ("ViltForQuestionAnswering", _TEXT | {"image_size": 32, "patch_size": 8}),
    "fuyu": ("FuyuForCausalLM", {"patch_size": 4, "text_config": {"model_type": "persimmon",
        **_TEXT}, **_TEXT}),
    "lxmert": ("LxmertForPreTraining", _TEXT | {"l_layers": 1, "x_layers": 1, "r_layers": 1,
        "visual_feat_dim": 16, "num_qa_labels": 7, "num_object_labels": 6, "num_attr_labels": 5}),
    "perceiver": ("PerceiverForMaskedLM", {"vocab_size": 100, "d_model": 32, "d_latents": 48,
        "num_latents": 8, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4, "qk_channels": 32, "v_channels": 48}),
    # -- series ---------------------------------------------------------------------------------
    "timesfm": ("TimesFmModelForPrediction", {"hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8, "patch_length": 8,
        "horizon_length": 16}),
    "patchtst": ("PatchTSTForPrediction", {"d_model": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "ffn_dim": 64, "num_input_channels": 3, "patch_length": 4,
        "patch_stride": 4, "prediction_length": 8}),
    "time_series": ("TimeSeriesTransformerForPrediction", {"prediction_length": 8,
        "context_length": 16, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64, "lags_sequence": [1, 2], "num_time_features": 1}),
    "decision_transformer": ("DecisionTransformerModel", {"state_dim": 6, "act_dim": 3,
        "hidden_size": 32, "n_layer": 2, "n_head": 4, "max_ep_len": 32}),
}
# fmt: on


def build(name: str) -> nn.Module:
    """The model of that name, without weights."""
    import transformers

    cls, config = CONFIGS[name]
    kind = getattr(transformers, cls)
    with torch.device("meta"):
        return kind(kind.config_class(**config))
