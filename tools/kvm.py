#!/usr/bin/env python3
"""kvm.py: whether /dev/kvm can be used; prints why not, and what to do, on one line, and ends with status 1.

Nothing is created: a file of that name would be in the way of the device.
"""

import fcntl
import grp
import os
import pwd
import sys

DEVICE = "/dev/kvm"
KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01


def user():
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def how_to_get_access(status):
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = ""
    if group == "kvm":
        return f"sudo usermod -aG kvm {user()}, then log in again"
    return f"sudo chmod a+rw {DEVICE}, or run as root"


def trouble():
    """Empty when a VM can be made."""
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return (f"there is no {DEVICE}: load kvm_intel or kvm_amd (modprobe), or turn virtualization on in the "
                "firmware, or nested virtualization where this machine is itself virtual")
    except PermissionError:
        return f"no access to {DEVICE}: {how_to_get_access(os.stat(DEVICE))}"
    except OSError as error:
        return f"{DEVICE} cannot be opened ({error.strerror}): look for kvm in dmesg"
    try:
        if fcntl.ioctl(device, KVM_GET_API_VERSION) != 12:
            return f"{DEVICE} is of another KVM: cppvmm needs version 12 of its interface"
    except OSError:
        return f"{DEVICE} is not KVM's device"
    try:
        os.close(fcntl.ioctl(device, KVM_CREATE_VM))
    except OSError as error:
        return f"KVM makes no VM ({error.strerror}): look for kvm in dmesg"
    return ""


if __name__ == "__main__":
    reason = trouble()
    if reason:
        print(reason)
        sys.exit(1)
