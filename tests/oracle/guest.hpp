// A vCPU that writes guest memory: a VM whose slots follow the case's map, and bare 64-bit code in memory of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <expected>
#include <memory>
#include <optional>
#include <span>
#include <string>

namespace cppvmm::oracle {

/// Guest memory is below this address: the code and its tables are there.
inline constexpr std::uint64_t guest_code_base = 0x3FE0'0000;

struct GuestSlot {
  std::uint64_t first_page = 0;
  std::uint64_t pages = 0;
  void* host = nullptr;
  bool read_only = false;
};

class Guest {
public:
  /// One line for a person where KVM cannot be used.
  [[nodiscard]] static std::expected<Guest, std::string> start();
  Guest(Guest&&) noexcept;
  Guest& operator=(Guest&&) = delete;
  ~Guest();

  /// What the guest has, in place of what it had.
  [[nodiscard]] std::expected<void, std::string> set_memory(std::span<const GuestSlot> slots);
  /// Stores `value` into `count` pages, from guest-physical `address` on; reads them without a value.
  [[nodiscard]] std::expected<void, std::string> access(std::uint64_t address, std::uint32_t count,
                                                        std::optional<std::uint8_t> value);
  /// Stores into page after page, and after each, how many it has stored into, as 32 bits at guest-physical `progress`.
  [[nodiscard]] std::expected<void, std::string> store_and_publish(std::uint64_t address, std::uint32_t count,
                                                                   std::uint64_t progress);
  /// Sets accessed bits by reading the same way through page tables at guest-physical `tables`.
  [[nodiscard]] std::expected<void, std::string> walk(std::uint64_t tables, std::uint64_t address, std::uint32_t count);
  /// The three pages of such tables, as bytes: the first GiB, in 2 MiB pages.
  static constexpr std::size_t table_pages = 3;
  static void write_tables(std::uint64_t tables, std::span<std::byte, table_pages * 4096> into);

  /// For guest_log.hpp.
  struct Machine;
  [[nodiscard]] Machine& machine() { return *machine_; }

private:
  explicit Guest(std::unique_ptr<Machine> machine);
  [[nodiscard]] std::expected<void, std::string> run(std::uint64_t tables, std::uint64_t code, std::uint64_t address,
                                                     std::uint32_t count, std::uint8_t value,
                                                     std::uint64_t progress = 0);
  std::unique_ptr<Machine> machine_;
};

} // namespace cppvmm::oracle
