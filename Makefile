# `make demo` sets up, builds and runs the demo; `make check` sets up, builds and runs every test.
# The build itself is meson's.
BUILD := build
.PHONY: all setup demo demo-pytorch lint check check-long bench bench-quality install clean

all: setup
	@[ -f $(BUILD)/build.ninja ] || meson setup $(BUILD) >$(BUILD).log 2>&1 || { cat $(BUILD).log; exit 1; }
	@ninja -C $(BUILD) --quiet
	@scripts/venv.sh python/requirements.txt || \
		echo "setup: perta ask, perta forget, perta metrics and perta tokenize need the packages in python/requirements.txt"

setup:
	@scripts/setup.sh

demo: all
	@$(BUILD)/perta demo demo --force

# The same demo, with the models, gradients and questions computed by PyTorch.
demo-pytorch: all
	@examples/demo.sh $(BUILD)/perta demo-pytorch

# clang-format, clang-tidy, shellcheck, ruff, codespell: about two minutes.
lint: all
	@scripts/lint.sh

check: all
	@scripts/check.sh

# The long tier: tests that take too long for every change, such as hundreds of kills.
check-long: all
	@scripts/check-long.sh

# Measure on this machine and compare with other programs. BENCH_GB= sets the size of the inputs;
# the results are written to bench/results/.
bench: all
	@scripts/bench.sh $(BUILD)

# Measure what is forgotten and what is kept, on a small model and on SmolLM2-135M. TOFU= is the
# folder of that benchmark's JSON lines. Takes hours on two CPUs, and continues where it was
# interrupted.
bench-quality: all
	@scripts/bench-quality.sh $(BUILD)

install: all
	meson install -C $(BUILD)

clean:
	rm -rf $(BUILD) $(BUILD).log build-dev build-dev.log build-tsan build-tsan.log demo demo-pytorch
