# `make` alone says what there is.

CARGO ?= cargo
PREFIX ?= /usr/local

# nextest runs each test in a process of its own and tells more; plain `cargo test` does as well.
NEXTEST = $(shell $(CARGO) nextest --version 2>/dev/null)
RUN_TESTS = $(if $(NEXTEST),$(CARGO) nextest run --no-fail-fast,$(CARGO) test --no-fail-fast)

# Tests that mount images need root and loop devices, which a container may lack.
MOUNTS = $(shell losetup --find 2>/dev/null)
ALL_OF_THEM = $(if $(MOUNTS),$(if $(NEXTEST),--run-ignored all,-- --include-ignored))

.PHONY: help
help: ## say what there is
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 12

.PHONY: demo
demo: deps build ## boot a real guest, take two snapshots under load, verify them
	@$(CARGO) build --quiet --release -p frazil-integration
	@$(CARGO) run --quiet --release -p frazil-integration --bin demo

.PHONY: test
test: deps ## run all tests, those with real guests included
	$(CARGO) build --quiet
	$(RUN_TESTS) --workspace $(ALL_OF_THEM)
	$(CARGO) test --quiet --workspace --doc
	@$(if $(MOUNTS),,echo "test: NOT run for want of root or loop devices: the tests that mount file systems")

.PHONY: check
check: lint test ## the gate: everything that must hold before a commit

.PHONY: lint
lint: ## format, clippy, rustdoc, licences
	$(CARGO) fmt --all --check
	$(CARGO) clippy --quiet --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --quiet --workspace --no-deps --document-private-items
	@# Advisories are not asked for here: their database is fetched from the network each time.
	@if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny --log-level error check licenses bans sources; \
	else echo "lint: licences NOT checked, cargo-deny is not installed"; fi

.PHONY: bench
bench: deps build ## measure against qemu-storage-daemon on the same file
	@$(CARGO) build --quiet --release -p frazil-integration
	@$(CARGO) run --quiet --release -p frazil-integration --bin bench

SOAK_MINUTES ?= 120

.PHONY: soak
soak: deps build ## hours of snapshots, increments, deletes and kills on a real guest: nothing lost, nothing grown
	@$(CARGO) build --quiet --release -p frazil-integration
	@$(CARGO) run --quiet --release -p frazil-integration --bin soak -- --minutes $(SOAK_MINUTES)

# Of each target, so many seconds. The corpus that grows is kept out of the repository; `fuzz/seeds` is in it. Names of
# functions are not printed: to find one takes longer than many executions.
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= $(shell ls fuzz/seeds)

.PHONY: fuzz
fuzz: ## fuzz all that strangers can say: images, requests, messages, QMP, NBD, the agent, super-blocks; needs nightly Rust
	@$(CARGO) +nightly --version >/dev/null 2>&1 || \
	{ echo "fuzz: nightly Rust is missing: rustup toolchain install nightly --profile minimal"; exit 1; }
	@$(CARGO) fuzz --version >/dev/null 2>&1 || \
	{ echo "fuzz: cargo-fuzz is missing: cargo install cargo-fuzz"; exit 1; }
	@set -e; for target in $(FUZZ_TARGETS); do mkdir -p fuzz/corpus/$$target; \
	$(CARGO) +nightly fuzz run $$target fuzz/corpus/$$target fuzz/seeds/$$target -- \
	-max_total_time=$(FUZZ_SECONDS) -max_len=65536 -rss_limit_mb=1024 -timeout=10 -print_funcs=0 -print_final_stats=1; done

# In all: three kinds of images take turns.
KILLS ?= 500

.PHONY: kills
kills: deps ## kill the daemon so many times under load (KILLS=500), and prove that nothing was lost
	$(CARGO) build --quiet
	KILLS=$$((($(KILLS) + 2) / 3)) $(CARGO) test --quiet -p frazil-tests --test cut killed:: -- --nocapture --test-threads 1

.PHONY: build
build: ## build the release binary
	$(CARGO) build --quiet --release

.PHONY: install
install: build ## install to PREFIX, /usr/local if not set
	install -Dm755 target/release/frazil $(DESTDIR)$(PREFIX)/bin/frazil
	install -Dm644 crates/frazil/dist/frazil@.service $(DESTDIR)$(PREFIX)/lib/systemd/system/frazil@.service

.PHONY: deps
deps: ## install what tests and demo need beside Rust (Debian, as root)
	@integration/deps
