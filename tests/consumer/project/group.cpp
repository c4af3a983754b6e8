// Uses the optional component as an embedder of Boost.Asio does; a group of no vCPUs ends at once, and needs no KVM.
#include <boost/asio/any_io_executor.hpp> // see modules/cppvmm.vcpu_group.cppm
#include <boost/asio/io_context.hpp>
#include <cstdio>
#include <vector>
import cppvmm.vcpu;
import cppvmm.vcpu_group;

int main() {
  boost::asio::io_context context;
  auto group = cppvmm::VcpuGroup::start(
      {}, [](cppvmm::Vcpu&, const cppvmm::Exit&) { return cppvmm::VcpuAction::end_vcpu; }, context.get_executor());
  bool ended = false;
  if (group) group->async_wait([&](const cppvmm::VcpuEnds& ends) { ended = ends.empty(); });
  context.run();
  if (!ended) return 1;
  std::puts("consumer_group: ok");
  return 0;
}
