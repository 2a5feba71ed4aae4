"""The architectures of vLLM that have a gated class, and where vLLM keeps the class that it derives from."""

ARCHITECTURES = {
    "Qwen2VLForConditionalGeneration": "qwen2_vl.Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl.Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration": "qwen3_vl.Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration",
    "InternVLChatModel": "internvl.InternVLChatModel",
    "InternVLForConditionalGeneration": "interns1.InternS1ForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision.LlavaOnevisionForConditionalGeneration",
    "LlavaNextVideoForConditionalGeneration": "llava_next_video.LlavaNextVideoForConditionalGeneration",
}
