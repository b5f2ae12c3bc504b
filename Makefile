# make                 train_gpt2 and test_gpt2
# make run             trains a small model for a minute, on this repository's own text, and lets it write
# make run TEXT=FILE   the same on your text; several names, and the shell's quotes, as in TEXT="'my novel.txt' b.txt"
# make gpu             train_gpt2cu and test_gpt2cu, where there is nvcc (its folder: CUDA=/usr/local/cuda)
# make train_gpt2cu_emulated   the GPU's kernels on a CPU, for tests; it takes no GPU and no CUDA
# make gpu-table       registers, instructions and least times of the GPU's kernels, without one: dev/bench/kernels.md
# make gpu-report      builds, tests and measures on a GPU: dev/results/; DEVICE=emulated tries it without one
# make test            all tests that need no PyTorch; packages for them go into .venv
# make test-sanitized  test_gpt2 under AddressSanitizer and UndefinedBehaviorSanitizer
# make test-amx        test_gpt2 with Intel's AMX, emulated
# make test-emulator   the emulator's own tests, and the GPU's code watched for races and bounds
# make test-builds     test_gpt2 with each compiler and instruction set that is found
# make test-peers      the tests against PyTorch, which is installed into .venv-peers (3 GB)
# make bench-peers     speed and memory beside PyTorch and Transformers, in turns: half an hour on two free cores
# make bench-ladder    from three plain loops to the matmul used here, step by step: dev/bench/ladder.md
# make reference       writes dev/reference anew, with PyTorch
# make clean           removes what was built; data/, run/ and the environments stay
# Variables: CXX=clang++, OPENMP= (do without it), CUDA=/usr/local/cuda, ARCH=-march=x86-64-v3 (for other machines
#            than this one)

# Builds on all cores, unless told otherwise. A make that a recipe starts begins anew.
MAKEFLAGS += -j$(shell getconf _NPROCESSORS_ONLN)
unexport MAKEFLAGS

# Whether a program can be built with some flags; the answer is "yes" or nothing.
builds = $(shell echo 'int main() {}' | $(CXX) $(1) -x c++ - -o /dev/null 2>/dev/null && echo yes)

# OpenMP runs the loops on all cores. clang++ takes the flag even where it has no library for it, hence the trial.
OPENMP := $(if $(call builds,-fopenmp -include omp.h),-fopenmp)
# The instruction set is this machine's. Some compilers would use only half of an AVX-512 register.
WIDE := -mprefer-vector-width=512
ARCH := -march=native $(if $(call builds,$(WIDE)),$(WIDE))
# In place of -ffast-math, which also reorders sums and forgets NaN, only what leaves every result well defined:
# no errno after sqrt, so that it is one instruction; no floating-point traps, so that both sides of a condition may
# be computed, in vectors; a * b + c rounded once. -fopenmp-simd heeds `omp simd` where there is no OpenMP, too.
MATH = -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp-simd
CXXFLAGS = -std=c++20 -O3 $(ARCH) $(MATH) -Wall -Wextra -pthread $(OPENMP)
# Stops at the first error, whatever kind it is.
SANITIZE = -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined

all: train_gpt2 test_gpt2

train_gpt2: train_gpt2.cpp .flags | found
	$(CXX) $(CXXFLAGS) $< -o $@
test_gpt2: test_gpt2.cpp train_gpt2.cpp .flags | found
	$(CXX) $(CXXFLAGS) $< -o $@
train_gpt2_sanitized: train_gpt2.cpp .flags | found
	$(CXX) $(CXXFLAGS) $(SANITIZE) $< -o $@
test_gpt2_sanitized: test_gpt2.cpp train_gpt2.cpp .flags | found
	$(CXX) $(CXXFLAGS) $(SANITIZE) $< -o $@
# All functions that pass each other AMX's vectors are in this one program, so how they do is of no importance.
test_gpt2_amx: test_gpt2.cpp train_gpt2.cpp dev/test/amx.h .flags | found
	$(CXX) $(CXXFLAGS) -Wno-psabi -include dev/test/amx.h $< -o $@

# The same program with the model on a GPU. Machine code for A100 and H100 or H200, and PTX for what comes after them.
NVCC := $(firstword $(wildcard $(if $(CUDA),$(CUDA)/bin/nvcc,$(addsuffix /nvcc,$(subst :, ,$(PATH)) /usr/local/cuda/bin))))
NVCCFLAGS = -O3 -std=c++20 -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=[sm_90,compute_90] \
            -Xcompiler -Wall,-Wextra,-Wno-unknown-pragmas
no_nvcc = no nvcc in $(or $(CUDA),PATH and /usr/local/cuda)
# Without nvcc, a recipe would begin with the - of -O3, and make take its failing for success.
nvcc = $(or $(NVCC),$(error $(no_nvcc): CUDA=FOLDER names its folder))
# cuBLASLt is found where nvcc found it, whatever LD_LIBRARY_PATH says.
CUBLASLT = -lcublasLt -Xlinker -rpath=$(abspath $(dir $(realpath $(NVCC)))../lib64)
gpu: $(if $(NVCC),train_gpt2cu test_gpt2cu)
	@echo "$(if $(NVCC),train_gpt2cu and test_gpt2cu are built by $(NVCC),$(no_nvcc): train_gpt2cu and test_gpt2cu are left out)"
train_gpt2cu: train_gpt2.cu train_gpt2.cpp .flags_gpu
	$(nvcc) $(NVCCFLAGS) $< -o $@ $(CUBLASLT)
test_gpt2cu: test_gpt2.cpp train_gpt2.cu train_gpt2.cpp .flags_gpu
	$(nvcc) $(NVCCFLAGS) -DGPT2_CUDA -x cu $< -o $@ $(CUBLASLT)
# Its kernels on a CPU: launches become calls (translate.py), and the emulator's header stands for CUDA's. What goes
# wrong shows in results; the checked build also reports races and accesses out of bounds, the sanitized one the latter.
EMULATED = -std=c++20 -O2 -g1 $(ARCH) -fno-math-errno -Wall -Wextra -Wno-unknown-pragmas -pthread \
           -include dev/emulator/cuda_emulator.h
CHECKED = $(EMULATED) -O1 -g -fsanitize=thread,alignment
EMULATOR = dev/emulator/cuda_emulator.h dev/emulator/translate.py
TRAIN_EMULATED = train_gpt2cu_emulated train_gpt2cu_checked train_gpt2cu_sanitized
TEST_EMULATED = test_gpt2cu_emulated test_gpt2cu_checked test_gpt2cu_sanitized
$(addsuffix .cpp,$(TRAIN_EMULATED)): train_gpt2.cu $(EMULATOR)
	python3 dev/emulator/translate.py $< $@
$(addsuffix .cpp,$(TEST_EMULATED)): test_gpt2.cpp train_gpt2.cu $(EMULATOR)
	python3 dev/emulator/translate.py $< $@
$(TEST_EMULATED): EMULATED += -DGPT2_CUDA
DUMPS = $(foreach state,$(wildcard dev/reference/*.state.bin),$(state:.state.bin=.model.bin) $(state))
%cu_emulated: %cu_emulated.cpp train_gpt2.cpp .flags | found
	$(CXX) $(EMULATED) $< -o $@
%cu_sanitized: %cu_sanitized.cpp train_gpt2.cpp .flags | found
	$(CXX) $(EMULATED) $(SANITIZE) $< -o $@
# Linked without ThreadSanitizer: the functions that the compiler calls before each access are the emulator's.
%cu_checked: %cu_checked.cpp train_gpt2.cpp .flags | found
	$(CXX) $(CHECKED) -c $< -o $@.o
	$(CXX) -pthread $@.o -o $@
gpu-table: $(if $(NVCC),train_gpt2cu_emulated)
	@python3 dev/bench/kernels.py "$(nvcc)"
gpu-report: .venv/ready
	@python3 dev/bench/gpu_report.py "$(if $(filter emulated,$(DEVICE)),emulated,$(nvcc))"

# Advice for those who did not say OPENMP= themselves.
found:
	@echo "$(CXX): $(if $(OPENMP),OpenMP found,no OpenMP: one thread$(if $(filter file,$(origin OPENMP)), (Debian: apt-get \
	install libomp-dev for clang++)))"
# Other flags than at the last call build everything again.
.flags: made_by = $(CXX) $(CXXFLAGS)
.flags_gpu: made_by = $(NVCC) $(NVCCFLAGS)
.flags .flags_gpu: always
	@echo '$(made_by)' | cmp -s - $@ || echo '$(made_by)' > $@
always:

# The C++ stands last, and so is also what the model is validated on.
TEXT = $(wildcard data_prep/*.py dev/*.py dev/test/*.py) test_gpt2.cpp train_gpt2.cpp
# 0.45 million parameters, 2 million tokens. A short context is learned soonest: its positions come by more often.
SMALL = --layers 2 --heads 4 --channels 128 --context 64 --batch 8 --steps 4000 --lr 3e-3 \
        --val-every 500 --val-batches 0 --save-every 500
run: train_gpt2
	python3 data_prep/prepare.py --tokenizer bytes --out data/demo --overwrite $(TEXT)
	./train_gpt2 train --train 'data/demo/train_*.bin' --val 'data/demo/val_*.bin' \
	    --out run/demo --overwrite $(SMALL)

# AMX's emulation needs an x86-64 compiler.
test: all train_gpt2_sanitized test_gpt2_sanitized \
     train_gpt2cu_emulated test_gpt2cu_emulated $(if $(call builds,-include immintrin.h),test_gpt2_amx) .venv/ready
	@python3 dev/test/run.py
test-sanitized: test_gpt2_sanitized
	./test_gpt2_sanitized
test-emulator: $(filter-out %_emulated,$(TRAIN_EMULATED) $(TEST_EMULATED)) .venv/ready
	python3 dev/emulator/test.py --compiler $(CXX)
	python3 dev/emulator/test.py --compiler $(CXX) --flags=-DEMULATOR_UCONTEXT=1
	./test_gpt2cu_checked $(DUMPS)
	./test_gpt2cu_sanitized $(DUMPS)
	GPU_PROGRAM=train_gpt2cu_checked .venv/bin/python -m pytest -q dev/test/test_emulator.py
	GPU_PROGRAM=train_gpt2cu_sanitized .venv/bin/python -m pytest -q dev/test/test_emulator.py
test-amx: test_gpt2_amx
	./test_gpt2_amx
test-builds:
	@dev/test/builds.sh
test-peers: all test_gpt2cu_emulated .venv-peers/ready
	@python3 dev/test/run.py --peers
bench-peers: train_gpt2 .venv-peers/ready
	.venv-peers/bin/python dev/bench/peers.py
dev/bench/ladder: dev/bench/ladder.cpp train_gpt2.cpp .flags | found
	$(CXX) $(CXXFLAGS) $< -o $@
bench-ladder: dev/bench/ladder
	./dev/bench/ladder
reference: .venv-peers/ready
	.venv-peers/bin/python dev/reference.py all

# `ready` marks an environment that is complete; one left half-made is mended at the next call. Tests run without .venv
# as far as they can, so that one may fail.
.venv/ready: dev/test/requirements.txt
	@echo "installing pytest, numpy and tiktoken into .venv"
	@$(call install,.venv,requirements.txt) || echo "no .venv: no network, or Python's venv is missing"
.venv-peers/ready: dev/test/requirements.txt dev/test/requirements-peers.txt
	@echo "installing PyTorch and Transformers into .venv-peers: about 3 GB to download, 6 GB on disk"
	@$(call install,.venv-peers,requirements-peers.txt)
install = python3 -m venv $(1) && $(1)/bin/python -m pip install -qq --only-binary :all: -r dev/test/$(2) && touch $@

clean:
	rm -rf train_gpt2cu test_gpt2cu *cu_emulated* *cu_checked* *cu_sanitized*
	rm -rf train_gpt2 test_gpt2 train_gpt2_sanitized test_gpt2_sanitized test_gpt2_amx dev/bench/ladder .flags .flags_gpu
help:
	@sed -n '/^# make/s/# //p;/^# Var/,/^$$/s/# //p' Makefile

.PHONY: all gpu gpu-table gpu-report found always run test test-sanitized test-emulator test-amx test-builds test-peers
.PHONY: bench-peers bench-ladder reference clean help
