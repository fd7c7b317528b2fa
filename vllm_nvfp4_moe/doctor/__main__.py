"""``python -m vllm_nvfp4_moe.doctor [CHECKPOINT]`` is ``nvfp4-moe doctor [CHECKPOINT]``."""

from vllm_nvfp4_moe.doctor.command import main

main()
