"""`virst push`: publishes a model folder on the Hugging Face hub."""

import argparse

from virst_jax.errors import UserError

HELP = """Publish a model on the Hugging Face hub, from where --model hf://OWNER/NAME loads it.

The model is compared with its digests first. The repository is made if it is not there, and what is left in it of an
earlier model is removed; other files, such as a README, stay. Log in with `hf auth login`, or set HF_TOKEN."""
EXAMPLES = """examples:
  virst push runs/mine/stage3/model someone/virst-mine
  virst push virst_7b someone/virst-7b --private --message "converted from the release"
"""
MODEL_FILES = ("params/**", "config.json", "digests.json", "tokenizer/**")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder")
    parser.add_argument("repository", metavar="OWNER/NAME", help="where to publish it")
    parser.add_argument("--private", action="store_true", help="a repository that is made is seen by its owner alone")
    parser.add_argument("--revision", help="branch to write to (the main one)")
    parser.add_argument("--message", default="model of virst_jax", help="of the commit (%(default)s)")


def run(args: argparse.Namespace) -> int:
    from virst_jax.api import find_model
    from virst_jax.io import model_folder

    name = args.repository.removeprefix("hf://")
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"{args.repository}: give OWNER/NAME")
    folder = find_model(args.model)
    if model_folder.check_model(folder) is None:
        raise UserError(f"{folder}: has no digests.json, so it may be damaged; convert or export it again")

    import huggingface_hub
    from huggingface_hub import errors

    hub = huggingface_hub.HfApi()
    try:
        made = hub.create_repo(name, private=args.private or None, exist_ok=True).repo_id
        if args.revision:
            hub.create_branch(made, branch=args.revision, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=made,
            folder_path=folder,
            allow_patterns=list(MODEL_FILES),
            delete_patterns=list(MODEL_FILES),
            commit_message=args.message,
            revision=args.revision,
        )
    except errors.LocalTokenNotFoundError as error:
        raise UserError("not logged in to the hub; run `hf auth login`, or set HF_TOKEN") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        advice = {
            401: "log in with `hf auth login`, or set HF_TOKEN to a token that may write",
            403: "the token may not write there; choose another owner, or a token that may",
        }.get(status, "try again later")
        raise UserError(f"hf://{name}: the hub refuses it ({_short(error)}); {advice}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"hf://{name}: cannot be written ({_short(error)}); check the name and the network") from error
    print(f"hf://{made}@{commit.oid}")
    return 0


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
