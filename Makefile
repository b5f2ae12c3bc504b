# make           builds train_gpt2 and test_gpt2
# make run       trains a small model for a minute on Python's documentation (on yours: TEXT="a.txt 'my b.txt'")
# make test      runs every test that needs no PyTorch; installs pytest, numpy and tiktoken into .venv
# make gpu       builds train_gpt2cu and test_gpt2cu, if nvcc is installed
# make bench     measures training and decoding with each attention
# make compare   trains models with each attention and compares them: ten minutes (another study: STUDY=mine.toml)
# make plot      plots the loss, learning rate and speed of runs: RUN="run/mine run/other"
# make clean     removes what was built; data/, run/ and .venv stay
# make -C dev    lists the targets for developers
# Variables: CXX=clang++, OPENMP= (builds without it), ARCH=-march=x86-64-v3 (for other machines), CUDA=/usr/local/cuda,
# MPI=1 (for several processes: builds with mpicxx, or what MPICXX names; the GPU's with NCCL, too)

# Build on all cores. A make called by another one gets JOBS=, since the two share their jobs.
JOBS := -j$(shell getconf _NPROCESSORS_ONLN)
MAKEFLAGS += $(JOBS)

# MPI's compiler is a g++ or clang++ that knows where MPI is. Its old C++ interface is left out.
MPICXX ?= mpicxx
MPIFLAGS = -DGPT2_MPI -DOMPI_SKIP_MPICXX -DMPICH_SKIP_MPICXX
ifdef MPI
override CXX := $(MPICXX)
endif

# $(call builds,FLAGS) is "yes" if the compiler can build a program with these flags, else empty.
builds = $(shell echo 'int main() {}' | $(CXX) $(1) -x c++ - -o /dev/null 2>/dev/null && echo yes)
# OpenMP runs loops on all cores. A trial, because clang++ accepts the flag even if its OpenMP library is missing.
OPENMP := $(if $(call builds,-fopenmp -include omp.h),-fopenmp)
# This machine's instruction set. The second flag: some compilers use only half of an AVX-512 register by default.
ARCH := $(firstword $(foreach flag,-march=native -mcpu=native,$(if $(call builds,$(flag)),$(flag))))
ARCH += $(if $(call builds,-mprefer-vector-width=512),-mprefer-vector-width=512)
# Not -ffast-math, which also reorders sums and ignores NaN, but its parts that keep every result well defined: sqrt
# sets no errno, so it is one instruction; no operation traps, so a vector loop may compute both sides of a condition;
# a * b + c is rounded once. -fopenmp-simd applies `omp simd` without OpenMP too.
MATH = -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp-simd
CXXFLAGS = -std=c++20 -O3 $(ARCH) $(MATH) -Wall -Wextra -pthread $(OPENMP) $(if $(MPI),$(MPIFLAGS))

all: train_gpt2 test_gpt2
train_gpt2 test_gpt2 dev/bench/bench: %: %.cpp train_gpt2.cpp .flags | found
	$(CXX) $(CXXFLAGS) $< -o $@
dev/bench/bench: dev/bench/limits.h
found:
	@echo "$(CXX): $(if $(OPENMP),OpenMP found,no OpenMP: one thread (clang++ on Debian: apt-get install libomp-dev))"

# Machine code for A100 (sm_80) and H100 or H200 (sm_90), and PTX for later GPUs. Kernels call constexpr functions.
NVCCFLAGS = -O3 -std=c++20 -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=[sm_90,compute_90] \
            --expt-relaxed-constexpr -Xcompiler -Wall,-Wextra,-Wno-unknown-pragmas,-Wno-parentheses \
            $(if $(MPI),$(MPIFLAGS) -ccbin $(MPICXX))
NVCC := $(firstword $(wildcard $(addsuffix /nvcc,$(or $(CUDA:=/bin),$(subst :, ,$(PATH)) /usr/local/cuda/bin))))
no_nvcc = no nvcc in $(or $(CUDA),PATH and /usr/local/cuda)
nvcc = $(or $(NVCC),$(error $(no_nvcc): CUDA=FOLDER names its folder))
# The program loads the cuBLASLt that belongs to nvcc, whatever LD_LIBRARY_PATH says. NCCL is the system's.
LIBRARIES = -lcublasLt $(if $(MPI),-lnccl) -Xlinker -rpath=$(abspath $(dir $(realpath $(NVCC)))../lib64)
gpu: $(if $(NVCC),train_gpt2cu test_gpt2cu)
	@echo "train_gpt2cu and test_gpt2cu are $(if $(NVCC),built by $(NVCC),left out: $(no_nvcc))"
train_gpt2cu: train_gpt2.cu train_gpt2.cpp .flags_gpu
	$(nvcc) $(NVCCFLAGS) $< -o $@ $(LIBRARIES)
test_gpt2cu: test_gpt2.cpp train_gpt2.cu train_gpt2.cpp .flags_gpu
	$(nvcc) $(NVCCFLAGS) -DGPT2_CUDA -x cu $< -o $@ $(LIBRARIES)

# These files hold the flags of the last build; other flags build everything again.
.flags: made_by = $(CXX) $(CXXFLAGS) $(MPICXX)
.flags_gpu: made_by = $(NVCC) $(NVCCFLAGS)
.flags .flags_gpu: always
	@echo '$(made_by)' | cmp -s - $@ || echo '$(made_by)' > $@

# The prose of Python's own documentation; if it is not installed, of this repository.
TEXT ?= data/demo.txt
data/demo.txt: data_prep/demo_text.py
	@mkdir -p data && python3 $< > $@.tmp && mv $@.tmp $@ || { rm -f $@.tmp; exit 1; }
# 0.66 million parameters, 3 million tokens. A short context trains fastest, because each position comes up more often.
NAME = $(if $(own_text),own,demo)
own_text = $(filter-out data/demo.txt,$(TEXT))
run: train_gpt2 $(filter data/demo.txt,$(TEXT))
	@test $$(cat $(TEXT) | wc -c) -ge 2000 || { echo 'error: TEXT needs 2,000 bytes or more' >&2; exit 1; }
	python3 data_prep/prepare.py --tokenizer bytes --out data/$(NAME) --overwrite $(TEXT)
	./train_gpt2 train --train 'data/$(NAME)/train_*.bin' --val 'data/$(NAME)/val_*.bin' --out run/$(NAME) --overwrite \
	    --layers 3 --heads 4 --channels 128 --context 96 --batch 8 --steps 4000 --lr 4e-3 \
	    --val-every 500 --save-every 500 --temperature 0.6 $(if $(own_text),,--prompt 'The ')
	@$(if $(own_text),,echo 'To train on text of your own: make run TEXT="mine.txt"')
test:
	@$(MAKE) JOBS= --no-print-directory -f dev/Makefile test-all
bench: dev/bench/bench
	./dev/bench/bench
compare: train_gpt2
	$(PLOTTING_PYTHON) dev/compare.py $(STUDY)
plot:
	$(PLOTTING_PYTHON) dev/plot.py $(or $(RUN),$(error name the runs: make plot RUN="run/mine run/other"))
# These need matplotlib and scipy.
PLOTTING_PYTHON = $(firstword $(wildcard .venv-peers/bin/python) python3)
clean:
	rm -f t*_gpt2 t*_gpt2cu t*_gpt2_* t*_gpt2cu_* .flags* dev/bench/bench dev/bench/benchcu* dev/bench/ladder \
	    dev/test/parts dev/fuzz/fuzz dev/fuzz/libfuzzer
help:
	@sed -n '/^#/!q;s/^# //p' $(firstword $(MAKEFILE_LIST))
.PHONY: all run test gpu bench compare plot clean help found always
