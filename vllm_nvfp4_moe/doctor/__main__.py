"""``python -m vllm_nvfp4_moe.doctor [CHECKPOINT]`` is ``nvfp4-moe doctor [CHECKPOINT]``."""

from quantize.cli.signals import end_at_once

if __name__ == "__main__":  # processes of its own may import this again
    end_at_once()
    from vllm_nvfp4_moe.doctor.command import main

    main()
