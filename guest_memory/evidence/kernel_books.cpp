module;
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <expected>
#include <fcntl.h>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
module cppvmm.guest_memory:kernel_books.impl;
import :book_files;
import :descriptor;
import :error;
import :kernel_books;
import :markers;
import :proc_maps;

namespace cppvmm {

const char* to_string(KernelBook book) {
  switch (book) {
  case KernelBook::page_tables:
    return "/proc/self/pagemap";
  case KernelBook::mappings:
    return "/proc/self/smaps";
  case KernelBook::counts:
    return "/proc/self/status";
  case KernelBook::descriptors:
    return "/proc/self/fd";
  case KernelBook::shared_memory:
    return "/proc/self/map_files";
  case KernelBook::userfaultfd:
    return "/dev/userfaultfd";
  case KernelBook::mapping_list:
    return "/proc/self/maps";
  }
  return "unknown";
}

/// Those of shared anonymous memory, which only a privileged process can open: 0, or errno of the first that failed.
static int keep_shared_files(BookSet& books) {
  int refused = 0;
  const auto walked = for_each_mapping_of_process([&](const ProcMapping& mapping) {
    if (!mapping.is_shared_anonymous()) return true;
    char name[64];
    std::snprintf(name, sizeof name, "%llx-%llx", static_cast<unsigned long long>(mapping.start),
                  static_cast<unsigned long long>(mapping.end));
    Descriptor file(openat(books.shared_memory.number(), name, O_RDONLY | O_CLOEXEC));
    if (file.is_open())
      books.shared_files.emplace_back(std::move(file));
    else if (errno != ENOENT) // it is gone meanwhile
      refused = errno;
    return refused == 0;
  });
  if (!walked) return walked.error().os_error;
  return refused;
}

/// None where all userfaultfds are the same file (before Linux 5.12): an embedder's could pass for it.
static KeptFile keepable_probe() {
  KeptFile probe(make_probe());
  const KeptFile another(make_probe());
  return probe.is_same_file(another) ? KeptFile() : std::move(probe);
}

MemoryResult<KernelBooks> KernelBooks::open() {
  auto books = std::make_shared<BookSet>();
  if (const int error = books->token.error(); error != 0)
    return std::unexpected(
        MemoryError{.code = MemoryErrc::os, .os_error = error, .operation = "MADV_WIPEONFORK of a page"});
  const auto open_book = [&](KernelBook book, KeptFile BookSet::* file, int flags) {
    Descriptor opened(::open(to_string(book), flags | O_CLOEXEC));
    if (!opened.is_open()) books->errors[static_cast<std::size_t>(book)] = errno;
    (*books).*file = KeptFile(std::move(opened));
  };
  open_book(KernelBook::page_tables, &BookSet::page_tables, O_RDONLY);
  open_book(KernelBook::mappings, &BookSet::mappings, O_RDONLY);
  open_book(KernelBook::counts, &BookSet::counts, O_RDONLY);
  open_book(KernelBook::descriptors, &BookSet::descriptors, O_RDONLY | O_DIRECTORY);
  open_book(KernelBook::shared_memory, &BookSet::shared_memory, O_RDONLY | O_DIRECTORY);
  open_book(KernelBook::userfaultfd, &BookSet::userfaultfd, O_RDWR);
  open_book(KernelBook::mapping_list, &BookSet::mapping_list, O_RDONLY);
  books->probe = keepable_probe();
  if (books->shared_memory.number() >= 0)
    books->errors[static_cast<std::size_t>(KernelBook::shared_memory)] = keep_shared_files(*books);
  // While a userfaultfd can be had.
  if (const int pagemap = books->page_tables.number(); pagemap >= 0) static_cast<void>(write_protect_marker(pagemap));
  if (!keep(books))
    return std::unexpected(
        MemoryError{.code = MemoryErrc::invalid_argument, .operation = "KernelBooks::open where one is open already"});
  return KernelBooks(std::move(books));
}

KernelBooks::KernelBooks(std::shared_ptr<const BookSet> books) : books_(std::move(books)) {}

KernelBooks& KernelBooks::operator=(KernelBooks&& other) noexcept {
  const KernelBooks ended(std::exchange(books_, std::move(other.books_)));
  return *this;
}

KernelBooks::~KernelBooks() {
  if (books_) end_keeping(books_.get());
}

std::optional<MemoryError> KernelBooks::missing(KernelBook book) const {
  const int error = books_ ? books_->errors[static_cast<std::size_t>(book)] : EBADF;
  if (error == 0) return std::nullopt;
  return MemoryError{.code = MemoryErrc::os, .os_error = error, .operation = to_string(book)};
}

} // namespace cppvmm
