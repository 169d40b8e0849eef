"""Copies of the image that were altered for a test."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile

from lab import PYTHON, ROOT

# static, so that it runs in the guest
BUSYBOX = "/bin/busybox"


@contextlib.contextmanager
def altered(lab, files=None, spoil=None, part="initramfs"):
    """A copy of the image, with other files in this initramfs of the manifest, which says so; or spoiled behind the manifest's back."""
    with tempfile.TemporaryDirectory(prefix="image-", dir=lab.dir) as folder:
        os.chmod(folder, 0o755)
        for name in os.listdir(lab.image):
            shutil.copy(f"{lab.image}/{name}", folder)
        if files:
            with tempfile.TemporaryDirectory(dir=lab.dir) as tree:
                for path, (content, mode) in files.items():
                    target = f"{tree}/{path}"
                    os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
                    with open(target, "wb") as file:
                        file.write(content)
                    os.chmod(target, mode)
                archive = subprocess.run([PYTHON, "-B", f"{ROOT}/torvm/image/cpio.py", tree], capture_output=True, check=True).stdout
            packed = subprocess.run(["zstd", "-q", "-3", "-c"], input=archive, capture_output=True, check=True).stdout
            with open(f"{folder}/manifest.json", encoding="utf-8") as file:
                manifest = json.load(file)
            initramfs = f"{folder}/{manifest[part]['file']}"
            # the kernel unpacks one archive after the other
            with open(initramfs, "ab") as file:
                file.write(packed)
            with open(initramfs, "rb") as file:
                data = file.read()
            manifest[part] |= {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            with open(f"{folder}/manifest.json", "w", encoding="utf-8") as file:
                json.dump(manifest, file)
        if spoil:
            spoil(folder)
        yield folder


def content(path):
    with open(path, "rb") as file:
        return file.read()
