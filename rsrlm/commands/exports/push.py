"""A folder goes to the hub, without a question."""

from pathlib import Path

from rsrlm.report.progress import Report
from rsrlm.settings.base import ConfigError, first_line


def check(repo: str) -> None:
    """Raises ConfigError, before anything is written, for a name that the hub would refuse, and where there is no
    token."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push {repo}: {first_line(error)}; write OWNER/NAME") from None
    if repo.count("/") != 1:
        raise ConfigError(f"--push {repo}: write OWNER/NAME")
    if not get_token():
        raise ConfigError(
            f"--push {repo}: no token; set HF_TOKEN to one that may write (https://huggingface.co/settings/tokens), or "
            "log in with `hf auth login`"
        )


def upload(folder: Path, repo: str, kind: str, report: Report) -> str:
    """The address of the repository; one that is not there is made, private. Raises ConfigError where the hub refuses
    or is not reached."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        with report.busy(f"uploading {folder} to {repo}"):
            made = api.create_repo(repo, repo_type=kind, private=True, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=folder, repo_type=kind, commit_message="Upload by rsrlm export")
    except Exception as error:  # the client raises a dozen unrelated types
        raise ConfigError(
            f"--push {repo}: {first_line(error)}; the export is in {folder}: `hf upload {repo} {folder} "
            f"--repo-type {kind}` tries again"
        ) from None
    return str(made)
