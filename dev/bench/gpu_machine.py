"""For gpu_report.py: runs commands that may fail, crash, hang or print garbage; describes the machine."""

import contextlib
import os
import platform
import re
import signal
import subprocess
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
OUTPUT_MOST = 4 << 20  # bytes; a program that prints more is stopped
ASK_SECONDS = 20  # nvidia-smi hangs where the driver does
# Oldest driver for each major version of CUDA: NVIDIA's "CUDA Compatibility"
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}

# ----------------------------------------------------------------------------------------------------------------------
# Running one command


def run(command, output, limit, stopped=lambda: ""):
    """Runs a command with its output in a file. Returns how it failed, or ""."""
    with open(output, "wb") as file:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file,
                                       stderr=subprocess.STDOUT, start_new_session=True)
        except OSError as error:
            return error.strerror
    end, failure = time.monotonic() + limit, ""
    while process.poll() is None and not failure:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
        if stopped():
            failure = "stopped"
        elif time.monotonic() > end:
            failure = f"not finished after {limit:g} s"
        elif os.path.getsize(output) > OUTPUT_MOST:
            failure = f"stopped, since it printed more than {OUTPUT_MOST >> 20} MiB"
    if process.returncode is None:
        end_group(process)
        return failure
    status = process.returncode if process.returncode >= 0 else 128 - process.returncode  # as the shell counts signals
    if status > 128 and status - 128 in list(signal.Signals):
        return f"crashed with {signal.Signals(status - 128).name}"
    return f"exit status {status}" if status else ""


def end_group(process):
    """Ends a process and those that it started. One that hangs in the driver may survive; then the report goes on."""
    for number in signal.SIGTERM, signal.SIGKILL:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(5)


def say(text):
    with contextlib.suppress(OSError, UnicodeError):  # the terminal may be gone; the report remains
        print(text, flush=True)


def read(path):
    """The text in a file, whatever a broken program has written there"""
    with open(path, encoding="utf-8", errors="replace") as file:
        return re.sub(r"[^\t\n -~\xa0-\ud7ff\ue000-\ufffc]", "?", file.read(OUTPUT_MOST))


def shorten(said, first=20, last=40):
    lines = [line[:300].rstrip() for line in said.strip().splitlines()]
    left_out = len(lines) - first - last
    return "\n".join(lines if left_out < 2 else lines[:first] + [f"({left_out} lines left out)"] + lines[-last:])


def without(pattern):
    return lambda said: "\n".join(line for line in said.splitlines() if line.strip() and not re.search(pattern, line))


def faults(said):
    return "\n".join(line for line in said.splitlines() if re.search(r"error|warning|undefined|\*\*\*", line, re.I))


def ask(*command):
    """What a program says and how it failed"""
    with tempfile.NamedTemporaryFile() as output:
        failure = run(command, output.name, ASK_SECONDS)
        said = read(output.name).strip()
        return said, failure and ": ".join([failure, *said.splitlines()[:1]])


# ----------------------------------------------------------------------------------------------------------------------
# The machine


def visible_device():
    """Which device CUDA uses, by nvidia-smi's list: GPU's number, name, UUID, or None. Then the number of GPUs and, if
    there is no device, why."""
    said, failure = ask("nvidia-smi", "-L")
    if failure:
        return None, 0, f"nvidia-smi: {failure}"
    devices = []
    for line in said.splitlines():
        gpu = re.match(r"GPU (\d+): (.*) \(UUID: (\S+)\)", line)
        mig = re.match(r"\s+MIG (\S+).*\(UUID: (\S+)\)", line)
        if gpu:
            devices.append(gpu.groups())
        elif mig and devices:
            number, name, _ = devices[-1]
            devices.append((number, f"{name.split(' MIG ')[0]} MIG {mig[1]}", mig[2]))
    gpus = len({number for number, _, _ in devices})
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    for number, name, uuid in devices:
        if number == wanted or wanted.startswith(("GPU-", "MIG-")) and uuid.startswith(wanted):
            parts = [d for d in devices if d[0] == number and d[2].startswith("MIG-")]  # CUDA uses the first of these
            return (parts[0] if parts and uuid.startswith("GPU-") else (number, name, uuid)), gpus, ""
    return None, gpus, f"nvidia-smi lists {gpus} GPUs, none of them CUDA_VISIBLE_DEVICES={wanted}"


def describe_gpu():
    """The device's name, the driver's version, and lines for the report"""
    device, gpus, failure = visible_device()
    try:
        driver = re.search(r"Module\s.*?(\d+\.\d[\d.]*)", read("/proc/driver/nvidia/version"))[1]
    except (OSError, TypeError):
        driver = ""
    if not device:
        return "", driver, [f"device     not known: {failure}", f"driver     {driver or 'not known'}"]
    number, name, uuid = device
    fields = ["driver_version", "memory.total", "memory.used", "utilization.gpu", "clocks.max.sm", "power.limit"]
    said, failure = ask("nvidia-smi", "-i", number, f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    known = {field: value.strip() for field, value in zip(fields, said.splitlines()[0].split(",") if said else [])
             if not failure and not re.match(r"\s*(\[|N/A|ERR)", value)}  # [N/A], [Not Supported], ...
    driver = known.pop("driver_version", driver)
    unknown = [field for field in fields[1:] if field not in known]
    lines = [f"device     GPU {number} of {gpus}: {name} ({uuid})",
             "           " + ("of the whole GPU: " if " MIG " in name else "")
             + ", ".join(f"{field} {value}" for field, value in known.items())
             + (f"; not known: {', '.join(unknown)}" if unknown else "") + (f" ({failure})" if failure else ""),
             f"driver     {driver or 'not known'}"]
    return name, driver, lines


def describe_host():
    try:
        cpu = re.search(r"model name\s*: (.*)", read("/proc/cpuinfo"))[1]
    except (OSError, TypeError):
        cpu = platform.processor() or platform.machine()
    return f"host       {cpu}, {os.cpu_count()} cores; {platform.system()} {platform.release()}"


def describe_commit():
    commit, failure = ask("git", "log", "-1", "--format=%h of %cs")
    changed, _ = ask("git", "status", "--porcelain", "-uno")
    return "commit     " + (f"not known: git: {failure}" if failure else
                            commit + (f", with changes to {', '.join(changed.split()[1::2])}" if changed else
                                      ", without changes"))


def describe_cuda(nvcc, driver):
    """Lines about nvcc, and whether the driver is too old for its programs"""
    said, failure = ask(nvcc, "--version")
    release = re.search(r"release (\d+)\S*", said)
    if failure or not release:
        return [f"nvcc       {nvcc}: {failure or 'its version is not known'}"]
    lines = [f"nvcc       {nvcc}, CUDA {release[0][8:].rstrip(',')}"]
    oldest = OLDEST_DRIVER.get(int(release[1]))
    major = re.match(r"\d+", driver)
    if oldest and major and int(major[0]) < oldest:
        lines.append(f"The driver is too old: CUDA {release[1]} needs {oldest} or later, this is {driver}. Update it.")
    return lines


def describe_machine(nvcc):
    """The device's name, and lines about all that results depend on"""
    name, driver, gpu = describe_gpu()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpu.append(f"           CUDA_VISIBLE_DEVICES={visible}")
    return name, [describe_commit(), *gpu, *(describe_cuda(nvcc, driver) if nvcc else []), describe_host()]
