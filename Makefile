# The front door: `make demo` sets up, builds and runs the main job; `make check` sets up,
# builds and passes every test. The build itself is meson's.
BUILD := build
.PHONY: all setup demo demo-pytorch lint check check-long bench bench-quality install clean

all: setup
	@[ -f $(BUILD)/build.ninja ] || meson setup $(BUILD) >$(BUILD).log 2>&1 || { cat $(BUILD).log; exit 1; }
	@ninja -C $(BUILD) --quiet

setup:
	@scripts/setup.sh

demo: all
	@$(BUILD)/perta demo demo --force

# The same story with the models trained, gradients taken and questions asked by PyTorch.
demo-pytorch: all
	@examples/demo.sh $(BUILD)/perta demo-pytorch

# Minutes: layout, spelling and what linters find; scripts/lint.sh names them.
lint: all
	@scripts/lint.sh

check: all
	@scripts/check.sh

# What takes too long for every change: kills by the hundred.
check-long: all
	@scripts/check-long.sh

# Measure on this machine, beside other programs: BENCH_GB= says how much, the page of results
# comes into bench/results/.
bench: all
	@scripts/bench.sh $(BUILD)

# What is forgotten and what is kept, of a small model and of SmolLM2-135M: TOFU= is the folder
# of that benchmark's JSON lines. Hours on two CPUs; goes on where it was.
bench-quality: all
	@scripts/bench-quality.sh $(BUILD)

install: all
	meson install -C $(BUILD)

clean:
	rm -rf $(BUILD) $(BUILD).log build-dev build-dev.log build-tsan build-tsan.log demo demo-pytorch
