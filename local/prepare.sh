#!/usr/bin/env bash
# Prepare LibriSpeech and MUSAN, from the download to validated features.
#
#   local/prepare.sh                                # everything, into download/ and data/
#   local/prepare.sh --stage 3 --stop-stage 3       # LibriSpeech's features only
#   mkdir -p download && ln -s /corpora/LibriSpeech download/ # use an existing copy
#
# Stages: 0 download, 1 LibriSpeech manifests, 2 MUSAN manifests,
#         3 LibriSpeech fbank, train-all-shuf and validation, 4 MUSAN fbank.
# Finished stages are not repeated: their stamps (.done) list the parts. Works with any of
# LibriSpeech's seven parts. MUSAN is needed only for training with --enable-musan true. Paths in
# data/ are relative to the repository unless --dl-dir or --data-dir are given.

set -eou pipefail
shopt -s extglob

stage=0
stop_stage=4
dl_dir=download
data_dir=data
num_jobs=$(getconf _NPROCESSORS_ONLN)

all_parts=(
  train-clean-100 train-clean-360 train-other-500 dev-clean dev-other test-clean test-other
)

usage="usage: local/prepare.sh [--stage N] [--stop-stage N] [--dl-dir DIR] [--data-dir DIR] \
[--num-jobs N]"

log() { printf '%s %s\n' "$(date '+%F %T')" "$*"; }
die() { printf 'prepare.sh: %s\n' "$*" >&2; exit 1; }
absolute() { if [[ $1 == /* ]]; then printf '%s' "$1"; else printf '%s' "$PWD/$1"; fi; }
number() { [[ $2 =~ ^[0-9]+$ ]] || die "$1 must be a number, not '$2'"; printf '%s' "$2"; }

while (( $# )); do
  if [[ $1 == -h || $1 == --help ]]; then echo "$usage"; exit; fi
  (( $# > 1 )) || die "$1 needs a value; $usage"
  case $1 in
    --stage) stage=$(number "$1" "$2") ;;
    --stop-stage) stop_stage=$(number "$1" "$2") ;;
    --dl-dir) dl_dir=$(absolute "$2") ;;
    --data-dir) data_dir=$(absolute "$2") ;;
    --num-jobs) num_jobs=$(number "$1" "$2") ;;
    *) die "unrecognized argument $1; $usage" ;;
  esac
  shift 2
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python3
[[ -x .venv/bin/python ]] && python=.venv/bin/python
# Unpack archives with Python's data filter: members cannot lie or point outside the folder.
lhotse() {
  "$python" -c 'import tarfile
tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
from lhotse.bin.lhotse import cli
cli()' "$@"
}

corpus=$dl_dir/LibriSpeech
musan=$dl_dir/musan
manifests=$data_dir/manifests
fbank=$data_dir/fbank

runs() { (( stage <= $1 && $1 <= stop_stage )); }
cuts() { printf '%s' "$fbank/librispeech_cuts_$1.jsonl.gz"; }

# is_done STAMP PARTS: check that the stamp lists these parts; icefall's empty stamp means all.
is_done() { [[ -f $1 && ( ! -s $1 || "$(cat "$1")" == "$2" ) ]]; }

# Print the LibriSpeech parts for which the path "$1 PART" exists; log the missing ones.
present_parts() {
  local part present=() missing=()
  for part in "${all_parts[@]}"; do
    if [[ -e $("$1" "$part") ]]; then present+=("$part"); else missing+=("$part"); fi
  done
  (( ${#present[@]} )) || die "no part of LibriSpeech in $(dirname "$("$1" x)")"
  (( ${#missing[@]} == 0 )) || log "without ${missing[*]}: not in $(dirname "$("$1" x)")" >&2
  echo "${present[*]}"
}
audio_of() { printf '%s' "$corpus/$1"; }
manifest_of() { printf '%s' "$manifests/librispeech_recordings_$1.jsonl.gz"; }

# download NAME DIR ARCHIVES COMMAND...: keep a linked or copied folder; if archives lie next to the
# folder, lhotse resumes its download.
download() {
  local name=$1 dir=$2 archives=$3
  shift 3
  if [[ -L $dir && ! -d $dir ]]; then die "$dir is a dangling link"; fi
  if [[ -L $dir ]] || { [[ -d $dir ]] && ! compgen -G "$dl_dir/$archives" > /dev/null; }; then
    log "$name: using the existing $dir"
    return
  fi
  log "$name: downloading to $dl_dir"
  lhotse download "$@" "$dl_dir" || die "the download of $name failed; run this \
again to resume, or link an existing copy: ln -s /path/to/$name '$dir'"
}

# Check that every transcript has a recording: lhotse only warns.
check_counts() {
  local part=$1 transcripts utterances
  transcripts=$(find -L "$corpus/$part" -name '*.trans.txt' -exec cat {} + | grep -c .) \
    || die "$corpus/$part has no transcripts (<speaker>/<chapter>/*.trans.txt)"
  utterances=$(gzip -cd "$2" | wc -l)
  (( transcripts == utterances )) \
    || die "$part has $transcripts transcripts but $utterances of them have audio in $corpus/$part"
}

librispeech_manifests() {
  local parts part todo=() new=$manifests/.part
  [[ -d $corpus ]] || die "$corpus is missing: run stage 0, or link your copy there"
  parts=$(present_parts audio_of)
  if is_done "$manifests/.librispeech.done" "$parts"; then
    log "LibriSpeech manifests: already done"
    return
  fi
  for part in $parts; do
    [[ -e $(manifest_of "$part") ]] || todo+=("$part")
  done
  if (( ${#todo[@]} )); then
    rm -rf "$new" # lhotse takes an unfinished file for a finished one
    lhotse prepare librispeech -j "$num_jobs" "${todo[@]/#/-p}" "$corpus" "$new"
    for part in "${todo[@]}"; do
      check_counts "$part" "$new/librispeech_supervisions_$part.jsonl.gz"
    done
    mv "$new"/librispeech_supervisions_* "$manifests/"
    mv "$new"/librispeech_recordings_* "$manifests/" # last: these mark a part as present
  fi
  echo "$parts" > "$manifests/.librispeech.done"
}

musan_manifests() {
  local part new=$manifests/.part
  if [[ -f $manifests/.musan.done ]]; then
    log "MUSAN manifests: already done"
    return
  fi
  for part in music speech noise; do
    [[ -d $musan/$part ]] || die "$musan/$part is missing: run stage 0. Training with \
--enable-musan false needs no MUSAN: continue with --stage 3 --stop-stage 3"
  done
  rm -rf "$new"
  lhotse prepare musan "$musan" "$new"
  mv "$new"/musan_* "$manifests/"
  touch "$manifests/.musan.done"
}

# shuffle_train PARTS: join all training cuts in random but reproducible order.
shuffle_train() {
  local part train=() files=() all new=$fbank/.part-train-all-shuf
  all=$(cuts train-all-shuf)
  for part in $1; do
    [[ $part != train-* ]] || { train+=("$part"); files+=("$(cuts "$part")"); }
  done
  if (( ${#files[@]} == 0 )); then
    log "no training part: skipping $all"
    return
  fi
  (( ${#train[@]} == 3 )) || log "$all: ${#train[@]} of 3 training parts, ${train[*]}"
  gzip -cd "${files[@]}" | shuf --random-source=<(yes) | gzip > "$new"
  mv "$new" "$all"
}

librispeech_fbank() {
  local parts part files=()
  parts=$(present_parts manifest_of)
  if is_done "$fbank/.librispeech.done" "$parts"; then
    log "LibriSpeech fbank: already done"
    return
  fi
  "$python" local/compute_fbank.py librispeech --manifest-dir "$manifests" \
    --output-dir "$fbank" --parts "${parts// /,}" --perturb-speed true --num-jobs "$num_jobs"
  shuffle_train "$parts"
  for part in $parts train-all-shuf; do
    [[ ! -f $(cuts "$part") ]] || files+=("$(cuts "$part")")
  done
  "$python" local/validate_manifest.py "${files[@]}"
  echo "$parts" > "$fbank/.librispeech.done"
}

musan_fbank() {
  if [[ -f $fbank/.musan.done ]]; then
    log "MUSAN fbank: already done"
    return
  fi
  "$python" local/compute_fbank.py musan --manifest-dir "$manifests" --output-dir "$fbank" \
    --num-jobs "$num_jobs"
  touch "$fbank/.musan.done"
}

mkdir -p "$manifests" "$fbank"
trap 'rm -rf "$manifests/.part" "$fbank/.part-train-all-shuf"' EXIT # remove partial files

if runs 0; then
  log "Stage 0: download"
  mkdir -p "$dl_dir"
  download LibriSpeech "$corpus" '@(train|dev|test)-@(clean|other)*.tar.gz' librispeech --full
  download musan "$musan" 'musan.tar.gz' musan
fi
if runs 1; then log "Stage 1: LibriSpeech manifests"; librispeech_manifests; fi
if runs 2; then log "Stage 2: MUSAN manifests"; musan_manifests; fi
if runs 3; then log "Stage 3: LibriSpeech fbank"; librispeech_fbank; fi
if runs 4; then log "Stage 4: MUSAN fbank"; musan_fbank; fi
log "prepare.sh: done"
