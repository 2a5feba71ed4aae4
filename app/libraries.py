"""The libraries that load a checkpoint, kept quiet."""


def prepare_libraries() -> None:
    """Imports what the pipeline needs, quietly."""
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()  # its retries without a network; the error says it in one line
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
