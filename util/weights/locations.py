"""Where weights are: a path, or an address whose files are downloaded once into a cache."""

import hashlib
import logging
import re
import shutil
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import torch
from filelock import FileLock
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging as hub_logging
from tqdm import tqdm

from util.errors import InputError
from util.weights.files import WeightsNotFoundError, read_weights_file

FILES = ("model.safetensors", "pytorch_model.bin")  # of weights in a folder, the first counts
SETTINGS = ("config.json", "preprocessor_config.json")  # beside them, see `util.weights.metadata`
SHARDED = "model.safetensors.index.json"
TIMEOUT = 30  # seconds without an answer
RETRY_LATER = (429, *range(500, 600))  # HTTP codes

_logger = logging.getLogger(__name__)


def local_path(name: str | Path) -> Path:
    """Return the local file or folder of a path or an address.

    Args:
        name: a path, local-dir:PATH, hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION as in timm, or
            an address that begins with https:// or http://. What is downloaded goes to the cache
            of huggingface_hub or torch.hub, and is used again.

    Raises:
        WeightsNotFoundError: an address cannot be reached, or is of nothing.
    """
    text = str(name)
    if hub := re.fullmatch(r"hf[-_]hub:([^@]*)(?:@(.+))?", text):
        return _from_hub(text, *hub.groups())
    if re.match(r"https?:/", text):
        return _from_web(text)
    return Path(text.removeprefix("local-dir:")).expanduser()


def weights_file(name: str | Path) -> Path:
    """Return the local file of weights of a path or an address, see `local_path`.

    Raises:
        WeightsNotFoundError: the address cannot be reached, or is of nothing.
        InputError: it is a folder without a file of weights.
    """
    path = local_path(name)
    if not path.is_dir():
        return path
    file = next((path / file for file in FILES if (path / file).is_file()), None)
    if file is None:
        if (path / SHARDED).is_file():
            raise InputError(
                f"the weights in {path} are split into several files: save them as one, such as "
                'with save_pretrained(..., max_shard_size="100GB")'
            )
        raise InputError(f"{' or '.join(FILES)} not found in {path}: give the path of a file")
    return file


def read_weights(name: str | Path) -> tuple[dict, Path]:
    """Read a file of weights, see `read_weights_file`; return its content and its folder.

    Raises:
        WeightsNotFoundError, InputError: see `weights_file` and `read_weights_file`.
    """
    file = weights_file(name)
    try:
        return read_weights_file(file), file.parent
    except WeightsNotFoundError:
        raise
    except InputError as error:
        if not re.match(r"https?:/", str(name)):
            raise
        # It would be used again and again.
        text = f"{error} (downloaded from {name}: delete {file} to download it again)"
        raise InputError(text) from error


def _from_hub(name: str, repository: str, revision: str | None) -> Path:
    """Download the weights of a repository, and the settings beside them; return their folder."""
    _logger.info("looking for %s in the cache and on the Hugging Face hub", name)
    hub_logging.set_verbosity_error()  # a line for every attempt otherwise
    try:
        files = (_from_repository(repository, revision, file) for file in FILES)
        weights = next(filter(None, files), None)
        for file in SETTINGS if weights else ():
            _from_repository(repository, revision, file, optional=True)
    except Exception as error:  # of the connection, the disk, or an invalid name
        raise _hub_error(name, error) from error
    if weights is None:
        raise WeightsNotFoundError(
            f"{name} has no {' or '.join(FILES)}: give the https:// address of its file of weights"
        )
    return weights.parent


def _from_repository(
    repository: str, revision: str | None, file: str, *, optional: bool = False
) -> Path | None:
    """Download one file; None if there is none.

    Args:
        optional: also None if there is no connection.
    """
    known = try_to_load_from_cache(repository, file, revision=revision)
    if known is not None and not isinstance(known, str):  # known not to exist
        return None
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except LocalEntryNotFoundError:  # no connection, and not in the cache
        if not optional:
            raise
        _logger.info("%s of %s is not in the cache, and not looked for offline", file, repository)
    except EntryNotFoundError:
        pass
    return None


def _hub_error(name: str, error: Exception) -> WeightsNotFoundError:
    if isinstance(error, GatedRepoError):
        reason = "is open only to those who asked: ask on its page, then run hf auth login"
    elif isinstance(error, RepositoryNotFoundError):
        reason = "does not exist, or is private: correct the name, or run hf auth login"
    elif isinstance(error, RevisionNotFoundError):
        reason = "does not exist: give a branch, tag or commit of the repository after the @"
    else:
        return _unreachable(name, error.__cause__ or error)
    return WeightsNotFoundError(f"{name} {reason}")


def _from_web(address: str) -> Path:
    """Download a file, unless an earlier call did; of several processes only one downloads."""
    address = re.sub(r":/+", "://", address, count=1)  # a Path has only one slash
    # Files of the same name from two addresses are not the same.
    digest = hashlib.blake2b(address.encode(), digest_size=8).hexdigest()
    folder = Path(torch.hub.get_dir(), "checkpoints", digest)
    path = folder / (Path(unquote(urlsplit(address).path)).name or "weights")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not path.exists():
                _logger.info("downloading %s to %s", address, path)
                _download(address, path)
    except HTTPError as error:
        reason = "does not exist: correct the address" if error.code == 404 else _refused(error)
        raise WeightsNotFoundError(f"{address} {reason}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise _unreachable(address, error) from error
    return path


def _refused(error: HTTPError) -> str:
    reason = str(error).partition("\n")[0].rstrip(".:")
    advice = "try again later" if error.code in RETRY_LATER else "correct the address"
    return f"is refused ({reason}): {advice}"


def _download(address: str, path: Path) -> None:
    request = Request(address, headers={"User-Agent": "crossmae"})
    unfinished = path.with_name(".unfinished")
    with urlopen(request, timeout=TIMEOUT) as response, unfinished.open("wb") as file:
        size = response.length  # None if the server does not say it
        progress = {"disable": None, "leave": False, "desc": path.name, "miniters": 1}
        with tqdm.wrapattr(response, "read", total=size, **progress) as source:
            shutil.copyfileobj(source, file)
        if size is not None and file.tell() != size:
            raise OSError(f"only {file.tell()} of {size} bytes arrived")
    unfinished.rename(path)


def _unreachable(name: str, error: BaseException) -> WeightsNotFoundError:
    cause = error.reason if isinstance(error, URLError) else error
    reason = str(cause).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return WeightsNotFoundError(
        f"{name} cannot be downloaded ({reason}): check the address and the connection, or copy "
        "the file here by other means and give its path"
    )
