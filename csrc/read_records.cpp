// read_records: many records of a cache into given memory, each with the digest of all its bytes.
//
// Where the file is mapped and in memory, a record is hashed and copied page by page, so that it
// comes from memory once.  Else it is read in chunks: `kv` goes straight to its place, the little
// behind it by a buffer, since chunks end where they like.

#include <fcntl.h>
#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "checks.h"
#include "hash.h"
#include "levels.h"
#include "ops.h"

namespace fpt {
namespace {

constexpr int64_t PAGE = 4096;
constexpr int64_t CHUNK = 1 << 20;    // a request to the disk
constexpr int64_t CHECKED = 1 << 18;  // of what is hashed next: with its copy, well within the second cache
constexpr int64_t PARTS = 4;

enum class Source : int64_t { file, direct_file, map };  // direct: opened with O_DIRECT

struct Part {
  char* data;      // [B, bytes]
  int64_t offset;  // in a record
  int64_t bytes;
};

struct Job {
  const int64_t* places;  // [B, 3]: descriptor, offset, Source
  const char* mapped;
  Part parts[PARTS];
  int64_t record_bytes;
  bool digests;
  const Kernels* kernels;
  int64_t* counts;   // [B]
  uint8_t* hashes;   // [B, 16]
};

// All of `bytes` at `offset`, in as many calls as it takes; fewer at the end of the file; -errno.
int64_t read_fully(int fd, char* to, int64_t bytes, int64_t offset, bool direct) {
  int64_t done = 0;
  while (done < bytes) {
    const ssize_t count = pread(fd, to + done, bytes - done, offset + done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return -errno;
    done += count;
    // Past a short direct read lies no aligned place to go on from: the file ended.
    if (count == 0 || (direct && count % PAGE)) break;
  }
  return done;
}

// Bytes [begin, end) of a record, at `from`, to where its parts have them.
void scatter(const Job& job, int64_t image, const char* from, int64_t begin, int64_t end) {
  for (const Part& part : job.parts) {
    const int64_t first = std::max(begin, part.offset);
    const int64_t last = std::min(end, part.offset + part.bytes);
    if (first < last)
      memcpy(part.data + image * part.bytes + first - part.offset, from + first - begin,
             last - first);
  }
}

// One record from a map.
void copy_one(const Job& job, int64_t image, const char* from, uint8_t* digest) {
  Hash hash(*job.kernels, job.record_bytes);
  for (int64_t at = 0; at < job.record_bytes; at += PAGE) {
    if (job.digests) hash.update(reinterpret_cast<const uint8_t*>(from + at), PAGE);
    scatter(job, image, from + at, at, at + PAGE);
  }
  if (job.digests) hash.finish(digest);
}

// One record; returns its bytes, fewer where its file ended, or -errno.
int64_t read_one(const Job& job, int64_t image, char* buffer, uint8_t* digest) {
  const int64_t* place = job.places + 3 * image;
  if (Source(place[2]) == Source::map) {
    copy_one(job, image, job.mapped + place[1], digest);
    return job.record_bytes;
  }
  const bool direct = Source(place[2]) == Source::direct_file;
  const int64_t straight = direct ? 0 : job.parts[0].bytes / PAGE * PAGE;
  const int64_t chunk = job.digests && !direct ? CHECKED : CHUNK;
  Hash hash(*job.kernels, job.record_bytes);
  for (int64_t at = 0; at < job.record_bytes;) {
    const bool in_place = at < straight;
    const int64_t end = std::min(at + chunk, in_place ? straight : job.record_bytes);
    char* to = in_place ? job.parts[0].data + image * job.parts[0].bytes + at : buffer;
    const int64_t count = read_fully(int(place[0]), to, end - at, place[1] + at, direct);
    if (count < 0) return count;
    if (count < end - at) return at + count;
    if (job.digests) hash.update(reinterpret_cast<const uint8_t*>(to), end - at);
    if (!in_place) scatter(job, image, to, at, end);
    at = end;
  }
  if (job.digests) hash.finish(digest);
  return job.record_bytes;
}

void read_some(const Job& job, int64_t images, std::atomic<int64_t>& next) {
  char* buffer = static_cast<char*>(std::aligned_alloc(PAGE, CHUNK));
  for (int64_t image; (image = next.fetch_add(1, std::memory_order_relaxed)) < images;)
    job.counts[image] =
        buffer ? read_one(job, image, buffer, job.hashes + 16 * image) : -int64_t{ENOMEM};
  std::free(buffer);
}

}  // namespace

// Threads of its own, since they wait for a disk: torch's are for computing.
std::tuple<Tensor, Tensor> read_records(
    Tensor places, Tensor mapped, Tensor kv, Tensor k_scales, Tensor v_scales, Tensor index,
    int64_t record_bytes, bool digests, int64_t threads, std::string level) {
  const int64_t images = places.size(0);
  check_cpu("places", places);
  check_sizes("places", places, {images, 3});
  STD_TORCH_CHECK(places.scalar_type() == ScalarType::Long && places.is_contiguous(),
                  "places must be int64 and contiguous");
  STD_TORCH_CHECK(record_bytes > 0 && record_bytes % PAGE == 0,
                  "record_bytes must be a multiple of ", PAGE, ", got ", record_bytes);
  STD_TORCH_CHECK(threads >= 1 && threads <= 1024, "threads must be in 1..1024, got ", threads);
  check_cpu("mapped", mapped);
  check_sizes("mapped", mapped, {-1});
  STD_TORCH_CHECK(mapped.scalar_type() == ScalarType::Byte && mapped.is_contiguous(),
                  "mapped must be uint8 and contiguous");
  const auto* from = static_cast<const int64_t*>(places.const_data_ptr());
  for (int64_t i = 0; i < images; ++i)
    STD_TORCH_CHECK(
        Source(from[3 * i + 2]) != Source::map ||
            (from[3 * i + 1] >= 0 && from[3 * i + 1] <= mapped.size(0) - record_bytes),
        "places must lie in mapped, of ", mapped.size(0), " bytes, got a record at ", from[3 * i + 1]);
  Tensor counts = torch::stable::empty({images}, ScalarType::Long);
  Tensor hashes = torch::stable::empty({images, digests ? 16 : 0}, ScalarType::Byte);
  Job job{from, static_cast<const char*>(mapped.const_data_ptr()), {}, record_bytes, digests,
          &kernels_for(level), static_cast<int64_t*>(counts.mutable_data_ptr()),
          static_cast<uint8_t*>(hashes.mutable_data_ptr())};
  const Tensor* tensors[PARTS] = {&kv, &k_scales, &v_scales, &index};
  const char* names[PARTS] = {"kv", "k_scales", "v_scales", "index"};
  int64_t offset = 0;
  for (int64_t i = 0; i < PARTS; ++i) {
    const Tensor& tensor = *tensors[i];
    check_cpu(names[i], tensor);
    check_sizes(names[i], tensor, {images, -1});
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Byte && tensor.is_contiguous(), names[i],
                    " must be uint8 and contiguous");
    job.parts[i] = {static_cast<char*>(tensor.mutable_data_ptr()), offset, tensor.size(1)};
    offset += (tensor.size(1) + 3) / 4 * 4;  // parts begin at multiples of 4 bytes
  }
  STD_TORCH_CHECK(offset <= record_bytes, "the parts of a record have ", offset,
                  " bytes, and record_bytes is ", record_bytes);
  std::atomic<int64_t> next{0};
  std::vector<std::thread> others;
  for (int64_t i = 1; i < std::min(threads, images); ++i)
    others.emplace_back([&] { read_some(job, images, next); });
  read_some(job, images, next);
  for (std::thread& other : others) other.join();
  return {counts, hashes};
}

}  // namespace fpt
