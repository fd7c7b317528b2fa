"""``python -m vllm_nvfp4_moe.doctor [CHECKPOINT]`` is ``nvfp4-moe doctor [CHECKPOINT]``."""

from vllm_nvfp4_moe.doctor.command import main

if __name__ == "__main__":  # processes of its own may import this again
    main()
