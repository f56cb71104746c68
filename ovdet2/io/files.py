"""Read and write artefacts: atomically, hashed, without pickle.

Every artefact is written to a temporary file in its folder, fsynced and renamed. A killed process or a full disk leaves
the old file or the new one, never a partial file.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovdet2.errors import DataError, SetupError, full_disk
from ovdet2.io.manifests import parse_manifest

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Generator[Path, None, None]:
    """Yield a temporary :class:`~pathlib.Path` next to ``path``; on success it is fsynced and renamed to ``path``.

    The parent folder is created. If the body raises, the temporary file is removed and ``path`` is not changed.

    Raises:
        SetupError: the folder cannot be made, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"the folder {path.parent} cannot be made ({error.strerror}): choose another one.") from None
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        # The permissions of the folder: some writers make files that only their owner can read.
        temporary.chmod(path.parent.stat().st_mode & 0o666)
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and (full := full_disk(error)) is not None:
            raise SetupError(f"{path} cannot be written: {full}") from None
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object, indent: int | None = None) -> None:
    """Write ``value`` as JSON to ``path`` atomically; text that is not valid Unicode is written with escapes."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which json may hold
        text = json.dumps(value, indent=indent)
    write_text(path, text + "\n")


def read_json(path: str | Path, remedy: str = "check the path") -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file is missing, unreadable, or not JSON that Python can parse (for example nested too deeply);
            the message names the path and ends with ``remedy``.
    """
    try:
        with open(path, encoding="utf-8-sig") as handle:  # some editors write a byte-order mark
            return json.load(handle)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: {remedy}.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): {remedy}.") from None
    except (ValueError, RecursionError) as error:  # ValueError: invalid JSON or UTF-8, or a number of over 4,300 digits
        raise DataError(f"{path} is not valid JSON ({error}): {remedy}.") from None


def write_safetensors(path: str | Path, tensors: Mapping[str, "torch.Tensor"], manifest: dict[str, Any]) -> None:
    """Write named tensors with a JSON manifest in the header's metadata, atomically.

    Args:
        path: file to write.
        tensors: dict of name to tensor; made contiguous and moved to the CPU here. Tensors that share memory, such as
            tied weights, are each written in full.
        manifest: JSON-serialisable dict; must hold "schema".

    Raises:
        SetupError: the file cannot be written, as on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if "schema" not in manifest:
        raise ValueError("a manifest needs the key 'schema'")
    tensors = _separate({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, str(temporary), metadata={"manifest": json.dumps(manifest, ensure_ascii=False)})
        except (SafetensorError, OSError) as error:
            free = shutil.disk_usage(temporary.parent).free / 1e9
            raise SetupError(
                f"{path} could not be written ({error}); {free:.1f} GB are free there: free disk space, or choose "
                "another folder."
            ) from None


def _separate(tensors):
    """The tensors with separate memory, which safetensors requires."""
    seen, separate = set(), {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if memory in seen and tensor.numel() else tensor
        seen.add(memory)
    return separate


def read_safetensors(
    path: str | Path, schema: str, remedy: str = "rebuild it"
) -> tuple[dict[str, "torch.Tensor"], dict[str, Any]]:
    """Read a file of :func:`write_safetensors`.

    Args:
        path: the file.
        schema: the "schema" value the manifest must hold.
        remedy: what the user should do, appended to error messages.

    Returns:
        (tensors, manifest): dict of CPU tensors, and the manifest dict.

    Raises:
        DataError: missing file, damaged file, no manifest, or another schema.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise DataError(f"{path} does not exist: {remedy}.")
    try:
        with safe_open(str(path), framework="pt") as handle:
            manifest = parse_manifest(handle.metadata())
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}
    except (SafetensorError, OSError, ValueError) as error:  # ValueError: a manifest that is not JSON
        raise DataError(f"{path} is not a complete safetensors file ({error}): {remedy}.") from None
    found = manifest.get("schema") if isinstance(manifest, dict) else None
    if found != schema:
        raise DataError(f"{path} has schema {found!r}, expected {schema!r}: {remedy}.")
    return tensors, manifest


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _fsync_folder(folder):
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
